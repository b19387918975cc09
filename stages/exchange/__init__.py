"""Caches for other tools."""
