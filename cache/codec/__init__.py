"""How packed stores code their states, and how such a store is read as the raw one that it stands for."""
