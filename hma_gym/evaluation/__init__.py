"""Policies in environments from paired starts, and the reports on it."""
