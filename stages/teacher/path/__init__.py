"""Noise paths: at what level of noise a scheduler's states are."""
