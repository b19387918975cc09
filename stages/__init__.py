"""What runs: `pretrain` (stage 0), `teacher` (stage one), `student` (stage two) and `evaluate`.

`teacher` and `student` never import each other: the cache is the only door between them.
"""
