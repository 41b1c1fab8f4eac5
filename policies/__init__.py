"""Policies: the protocol, scripted ones, and adapters to learned ones."""

if __name__ == "policies":
    raise ImportError("import hma_gym.policies instead of policies: this folder is part of the hma_gym package.")
