"""Feature networks, and the distances and statistics that are taken in them."""
