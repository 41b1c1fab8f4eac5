"""Judges: success read from frames, with a probability and how far it can be trusted."""
