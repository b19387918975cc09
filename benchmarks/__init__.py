"""Small programs, one a question: how fast advkd is beside what a user would do instead. `make bench` runs them all."""
