"""Stage 0, only for experiments without a teacher of their own: train a small one, and a classifier to score with."""
