"""Stage two: train a one-pass student from a trajectory cache alone, and use it.

Nothing here imports diffusers or `advkd.stages.teacher`, or reads anything of the teacher's.
"""
