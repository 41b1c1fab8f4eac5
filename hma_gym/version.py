"""The version of the package, on the lowest floor so that checkpoints can record it."""

__version__ = "0.1.0"
