"""Scores of what came out: Fréchet distances, paired errors, cost, and the samplers one would otherwise use."""
