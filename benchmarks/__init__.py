"""Benchmarks: one script per table, each also ``hma-gym bench NAME``."""

if __name__ == "benchmarks":
    raise ImportError("import hma_gym.benchmarks instead of benchmarks: this folder is part of the hma_gym package.")
