"""The paper's student: network and training."""
