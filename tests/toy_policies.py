"""Tiny policies for tests, and factories of policies that make mistakes (imported by worker processes)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from hma_gym.policies.diffusion import DiffusionConfig, DiffusionModel, Normalisation
from hma_gym.policies.functions import FunctionPolicy, RandomPolicy
from hma_gym.policies.loading import EpisodeSeed
from hma_gym.policies.protocol import Observation

SIZE = 40
CONFIG = DiffusionConfig(
    image_size=(SIZE, SIZE),
    encoder_channels=(8, 8),
    encoder_blocks=1,
    observation_horizon=2,
    action_horizon=8,
    keypoints=8,
    condition_width=16,
    unet_channels=(8, 16),
    width=16,
    layers=1,
    heads=2,
    train_timesteps=20,
    inference_steps=3,
    auxiliary_dim=5,
    noise_draws=2,
)
STATISTICS = Normalisation(
    (0.1,) * 9, (0.5,) * 9, (-1.0,) * 7, (1.0,) * 7, (0.0, 0.0, 0.82, 0.0, 0.0), (0.02, 0.02, 0.01, 0.7, 0.7)
)


def toy_diffusion(network: str = "unet") -> DiffusionModel:
    """Random weights; the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return DiffusionModel(replace(CONFIG, network=network), STATISTICS)


def observations(count: int, seed: int) -> dict[str, np.ndarray]:
    """Random pixels and agent_pos of so many environments."""
    rng = np.random.default_rng(seed)
    return {
        "pixels": rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8),
        "agent_pos": rng.uniform(-0.5, 0.5, (count, 9)).astype(np.float32),
    }


def random(episodes: Sequence[EpisodeSeed]) -> RandomPolicy:
    """A good one."""
    return RandomPolicy([episode.seed for episode in episodes])


def _zeros(observation: Observation, horizon: int = 2) -> np.ndarray:
    assert isinstance(observation, dict)
    return np.zeros((len(observation["pixels"]), horizon, 7), np.float32)


def still(episodes: Sequence[EpisodeSeed]) -> FunctionPolicy:
    """A good one that does nothing."""
    return FunctionPolicy(_zeros)


def not_finite(episodes: Sequence[EpisodeSeed]) -> FunctionPolicy:
    """Returns NaN."""
    return FunctionPolicy(lambda observation: _zeros(observation) * np.nan)


def wrong_shape(episodes: Sequence[EpisodeSeed]) -> FunctionPolicy:
    """Returns six numbers where seven are wanted."""
    return FunctionPolicy(lambda observation: _zeros(observation)[..., :6])


def raises(episodes: Sequence[EpisodeSeed]) -> FunctionPolicy:
    """Raises in the second episode's start only, so that its first is kept."""

    def act(observation: Observation) -> np.ndarray:
        if episodes[0].start:
            raise KeyError("gripper")
        return _zeros(observation)

    return FunctionPolicy(act)


def hangs(episodes: Sequence[EpisodeSeed]) -> FunctionPolicy:
    """Never answers."""

    def act(observation: Observation) -> np.ndarray:
        while True:
            time.sleep(1)

    return FunctionPolicy(act)


class Watcher:
    """Chunks of two actions: the brightness of the image that it acts on, and how many images it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def reset(self, mask_N: np.ndarray) -> None:
        self.seen = 0

    def observe(self, observation: Observation) -> None:
        self.seen += 1

    def act(self, observation: Observation) -> np.ndarray:
        assert isinstance(observation, dict)
        actions = np.zeros((1, 2, 7), np.float32)
        actions[..., 0] = observation["pixels"].mean() / 255
        actions[0, :, 1] = np.array([self.seen, self.seen + 1]) / 100
        self.seen += 1
        return actions


def watcher(episodes: Sequence[EpisodeSeed]) -> Watcher:
    return Watcher()


def half_dim_zero(episodes: Sequence[EpisodeSeed]) -> FunctionPolicy:
    actions = np.zeros((1, 7), np.float32)
    actions[:, 0] = 0.5
    return FunctionPolicy(lambda observation: actions)
