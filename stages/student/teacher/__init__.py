"""A student that is the teacher's own network, unrolled over a few recorded states."""
