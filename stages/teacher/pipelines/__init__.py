"""Text-to-image teachers: any diffusers pipeline, recorded through its own call."""
