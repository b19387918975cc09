"""Writing a cache: blocks that are sampled, merged, cut out or packed."""
