"""What binds a run together: configuration, command line, progress."""
