"""Measures of video fidelity, controllability and ranking."""
