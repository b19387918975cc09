"""A student as a static page that samples it in the browser."""
