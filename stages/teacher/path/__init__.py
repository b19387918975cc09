"""Noise paths: the noise levels that a solver passes through."""
