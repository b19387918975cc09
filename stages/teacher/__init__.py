"""Stage one: run a diffusion teacher once over many seeds and keep its denoising states in a cache."""
