"""Real images: labelled sets that a package ships, and folders of image files."""
