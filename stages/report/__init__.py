"""A report on evaluated runs: one HTML file that can be sent."""
