"""The commands. Each module here parses and prints; the work is in `advkd.stages`.

Nothing heavy is imported before a command needs it, so that `--help` is quick.
"""
