"""The scripted Lift policy on what it sees: the same scripts, fed from the image and agent_pos alone.

A script needs to know where the cube is, and only ground truth can tell it. Here a network reads the cube's place and
yaw off the image, and the hand's pose comes from ``agent_pos``: so the policy runs, closed loop and unchanged, in
ground truth and in a learned world, and what it believes is what each world shows it. The network is the encoder of a
diffusion policy trained with ``read_object=True``.

Shape legend: N environments, T rows, X = 5 numbers of the object: position 3 (m), cosine and sine of four times its
yaw (a cube looks the same after a quarter turn).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hma_gym.data.object_pose import OBJECT_KEY, POSITION, QUATERNION
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.policies.diffusion.model import DiffusionModel
from hma_gym.policies.protocol import Observation
from hma_gym.policies.scripted import LiftScript, ScriptedConfig

OBJECT_SIZE = 5
_SETTLED = 0.5
"""Share of the latest reading in the believed place: one glance is noisy, and a cube may move."""


def object_targets(obs: Mapping[str, NDArray[Any]], where: str) -> NDArray[np.float32]:
    """(T, 5) from robosuite's ``object`` observation (position 3 m, quaternion 4 xyzw, ...).

    Raises:
        DatasetError: the episode does not tell.
    """
    if OBJECT_KEY not in obs or obs[OBJECT_KEY].shape[-1] < QUATERNION.stop:
        raise DatasetError(
            f"{where}: obs/{OBJECT_KEY} with position and quaternion is needed to read the object; record it, or "
            "train with read_object=False."
        )
    rows = np.asarray(obs[OBJECT_KEY], dtype=np.float64)
    x, y, z, w = np.moveaxis(rows[:, QUATERNION], -1, 0)
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2))
    return np.concatenate([rows[:, POSITION], np.cos(4 * yaw)[:, None], np.sin(4 * yaw)[:, None]], axis=1).astype(
        np.float32
    )


class SightedLift:
    """A scripted Lift policy for N environments that sees pixels and agent_pos only.

    Args:
        config: behaviour of every environment's policy.
        model: a diffusion policy with an auxiliary head of the object; its encoder is the eye.
        seeds: one for each of the N environments; episode k of environment n draws from ``(seeds[n], k)``.

    Raises:
        InvalidArgument: the model cannot read the object.
    """

    def __init__(self, config: ScriptedConfig, model: DiffusionModel, seeds: Sequence[int]) -> None:
        if model.config.auxiliary_dim != OBJECT_SIZE:
            raise InvalidArgument(
                "the sighted script needs a diffusion policy trained with read_object=True (hma-gym train policy "
                f"--read-object), got one with auxiliary_dim={model.config.auxiliary_dim}."
            )
        self.config = config
        self.model = model.eval()
        self._seeds = [int(seed) for seed in seeds]
        self._episode_N = np.full(len(self._seeds), -1)
        self._scripts: list[LiftScript | None] = [None] * len(self._seeds)
        self._belief_NX: NDArray[np.float64] = np.zeros((len(self._seeds), OBJECT_SIZE))
        self._fresh_N = np.ones(len(self._seeds), dtype=np.bool_)

    def reset(self, mask_N: NDArray[np.bool_]) -> None:
        """Start a new episode's script where ``mask_N`` is true."""
        for n in np.flatnonzero(mask_N):
            self._episode_N[n] += 1
            self._scripts[n] = LiftScript(self.config, np.random.default_rng([self._seeds[n], int(self._episode_N[n])]))
            self._fresh_N[n] = True

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Actions (N, 1, 7) from ``pixels`` (N, H, W, 3) uint8 and ``agent_pos`` (N, 9).

        Raises:
            InvalidArgument: the observation lacks one of them.
        """
        if not isinstance(observation, Mapping) or not {"pixels", "agent_pos"} <= observation.keys():
            raise InvalidArgument(
                "the sighted script needs observation['pixels'] and ['agent_pos']; make the environment with "
                "obs_type='pixels_agent_pos'."
            )
        images = torch.from_numpy(np.ascontiguousarray(observation["pixels"])).to(self.model.action_low.device)
        seen_NX = self.model.read_auxiliary(images).cpu().numpy().astype(np.float64)
        share = np.where(self._fresh_N[:, None], 1.0, _SETTLED)
        self._belief_NX = share * seen_NX + (1 - share) * self._belief_NX
        self._fresh_N[:] = False
        actions = []
        for script, belief_X, pose_P in zip(self._scripts, self._belief_NX, observation["agent_pos"], strict=True):
            if script is None:
                raise InvalidArgument("call reset() for all environments before act().")
            actions.append(script.act(believed_state(belief_X, np.asarray(pose_P, dtype=np.float64))))
        return np.stack(actions)[:, None]


def believed_state(belief_X: NDArray[np.float64], pose_P: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """What the scripts read (see ``Simulation.privileged``), from what was seen of one environment.

    Args:
        belief_X: the object as the network sees it.
        pose_P: agent_pos: hand position 3 (m), quaternion 4 xyzw, fingers 2.
    """
    yaw = np.arctan2(belief_X[4], belief_X[3]) / 4
    quaternion = pose_P[3:7] / max(float(np.linalg.norm(pose_P[3:7])), 1e-9)
    return {
        "cube_pos": belief_X[:3],
        "cube_quat": np.array([0.0, 0.0, np.sin(yaw / 2), np.cos(yaw / 2)]),
        "eef_pos": pose_P[:3],
        "eef_quat": quaternion,
        "finger_axis": _finger_axis(quaternion),
    }


def _finger_axis(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minus the y axis of the hand's frame (xyzw): along it the Panda's fingers close."""
    x, y, z, w = quaternion
    return -np.array([2 * (x * y - z * w), 1 - 2 * (x * x + z * z), 2 * (y * z + x * w)])
