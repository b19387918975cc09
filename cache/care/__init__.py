"""Looking after a store: verifying every byte, repairing, summing up."""
