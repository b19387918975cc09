"""Sampling with recorded states."""
