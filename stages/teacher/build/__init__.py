"""Building a cache: planning, sampling blocks, committing them, one process or many."""
