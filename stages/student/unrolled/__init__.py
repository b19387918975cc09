"""The unrolled student: configuration, network, training."""
