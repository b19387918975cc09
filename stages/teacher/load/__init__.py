"""Loading a teacher through diffusers."""
