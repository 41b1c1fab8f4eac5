"""The diffusion policy at work: N environments, each with its own history and its own random numbers.

Shape legend: N environments, O observations, H predicted actions, A action dims, P agent_pos dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hma_gym.errors import InvalidArgument
from hma_gym.policies.diffusion.files import load_diffusion
from hma_gym.policies.diffusion.model import DiffusionModel
from hma_gym.policies.protocol import Observation


class DiffusionPolicy:
    """A :class:`~hma_gym.policies.protocol.WatchingPolicy` that gives ``action_horizon`` actions at a time.

    Args:
        model: trained; it is put into eval mode.
        seeds: one for each of the N environments; episode k of environment n draws its noise from
            ``(seeds[n], k)``, whatever the other environments do.
    """

    def __init__(self, model: DiffusionModel, seeds: Sequence[int]) -> None:
        if not seeds:
            raise InvalidArgument("seeds must hold one seed per environment, got none.")
        self.model = model.eval()
        self._seeds = [int(seed) for seed in seeds]
        self._episode_N = np.full(len(self._seeds), -1)
        self._generators = [np.random.default_rng([seed, 0]) for seed in self._seeds]
        self._fresh_N = np.ones(len(self._seeds), dtype=np.bool_)
        self._images: list[NDArray[np.uint8]] = []
        self._poses: list[NDArray[np.float32]] = []

    def reset(self, mask_N: NDArray[np.bool_]) -> None:
        """Forget the observations and begin the next stream of noise where ``mask_N`` is true."""
        for n in np.flatnonzero(mask_N):
            self._episode_N[n] += 1
            self._generators[n] = np.random.default_rng([self._seeds[n], int(self._episode_N[n])])
            self._fresh_N[n] = True

    def observe(self, observation: Observation) -> None:
        """Take note of the observations of one step without acting on them."""
        pixels, pose = self._read(observation)
        horizon = self.model.config.observation_horizon
        if not self._images:
            self._images, self._poses = [pixels] * horizon, [pose] * horizon
        images = [*self._images[1:], pixels]
        poses = [*self._poses[1:], pose]
        if self._fresh_N.any():  # an episode's first observation stands for those before it
            rows = self._fresh_N
            images = [np.where(rows[:, None, None, None], pixels, image) for image in images]
            poses = [np.where(rows[:, None], pose, old) for old in poses]
            self._fresh_N = np.zeros_like(rows)
        self._images, self._poses = images, poses

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next actions (N, action_horizon, A), from this observation and the noted ones before it.

        Args:
            observation: ``pixels`` (N, H, W, 3) uint8 with ``agent_pos`` (N, P), or the images alone for a policy
                without agent_pos.

        Raises:
            InvalidArgument: missing or misshapen observations.
        """
        self.observe(observation)
        config = self.model.config
        device = self.model.action_low.device
        shape = (config.prediction_horizon, config.action_dim)
        noise_NHA = np.stack([generator.standard_normal(shape, np.float32) for generator in self._generators])
        actions = self.model.sample(
            torch.from_numpy(np.stack(self._images, axis=1)).to(device),
            torch.from_numpy(np.stack(self._poses, axis=1)).to(device),
            torch.from_numpy(noise_NHA).to(device),
        )
        return np.asarray(actions.cpu().numpy(), dtype=np.float32)

    def _read(self, observation: Observation) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        config, count = self.model.config, len(self._seeds)
        pixels: Any = observation["pixels"] if isinstance(observation, Mapping) else observation
        pose: Any = np.zeros((count, 0), np.float32)
        if config.agent_pos_dim:
            if not isinstance(observation, Mapping) or "agent_pos" not in observation:
                raise InvalidArgument(
                    "this diffusion policy needs observation['agent_pos']; make the environment with "
                    "obs_type='pixels_agent_pos'."
                )
            pose = np.asarray(observation["agent_pos"], dtype=np.float32)
        images = np.asarray(pixels)
        wanted = ((count, *config.image_size, 3), (count, config.agent_pos_dim))
        if images.dtype != np.uint8 or (images.shape, pose.shape) != wanted:
            raise InvalidArgument(
                f"this diffusion policy needs uint8 images {wanted[0]} and agent_pos {wanted[1]}, got {images.dtype} "
                f"{images.shape} and {pose.shape}."
            )
        return images, pose


def load_diffusion_policy(folder: str | Path, seeds: Sequence[int]) -> DiffusionPolicy:
    """The policy of a checkpoint folder for as many environments as there are seeds.

    Raises:
        CheckpointError: see :func:`hma_gym.policies.diffusion.files.load_diffusion`.
    """
    return DiffusionPolicy(load_diffusion(folder), seeds)
