"""What a store is: recipe, layout, noise, ledger, the Zarr metadata, and reading them from anywhere."""
