"""Care of a store: verifying every byte, repairing, summarising."""
