"""What trains any student: the loop, data, checkpoints, runs, processes."""
