"""Measures: how near a video is to the truth, how far it obeys actions, how well it ranks policies.

Pure functions of tensors and arrays; nothing here knows a model, an environment or a file.
"""
