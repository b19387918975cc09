"""Reading a cache: states by seed, memory-mapped and checked, and how far two stores are apart."""
