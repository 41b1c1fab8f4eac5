"""Environments: learned (HMA-*) and ground truth (GroundTruth-*), and the task table."""

if __name__ == "envs":
    raise ImportError("import hma_gym.envs instead of envs: this folder is part of the hma_gym package.")
