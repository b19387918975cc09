"""Small programs, one question each: how fast is advkd compared with the alternatives? `make bench` runs them all."""
