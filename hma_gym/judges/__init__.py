"""Judges: success read from frames."""
