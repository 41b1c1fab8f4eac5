"""Evaluation: what a learned world gets right, measured against the simulator that it was learned from."""
