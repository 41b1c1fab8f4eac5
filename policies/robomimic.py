"""robomimic checkpoints (BC, BC-RNN, BC-Transformer ...) as policies, through robomimic's own loader.

Shape legend: N environments, A action dims, F stacked frames, H W image.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hma_gym.data.episodes import EEF_POS, EEF_QUAT, GRIPPER
from hma_gym.errors import CheckpointError, InvalidArgument
from hma_gym.policies.protocol import Observation
from hma_gym.robomimic_compat import import_robomimic

_PURPOSE = "policies of robomimic"
_PARTS: Mapping[str, slice] = {
    "agent_pos": slice(None),
    EEF_POS: slice(0, 3),
    EEF_QUAT: slice(3, 7),
    GRIPPER: slice(7, 9),
}
"""robomimic's keys that ``agent_pos`` answers, and where in it."""


@dataclass(frozen=True)
class RobomimicCheckpoint:
    """A loaded checkpoint.

    Attributes:
        algorithm: robomimic's name of it, e.g. ``bc``.
        rollout_policy: robomimic's ``RolloutPolicy``.
        image_key: the camera that it sees; None for a policy without one.
        image_size: (H, W) of that.
        low_dim_keys: its other observations.
        frame_stack: F, 1 for policies that see the present only.
    """

    algorithm: str
    rollout_policy: Any
    image_key: str | None
    image_size: tuple[int, int]
    low_dim_keys: tuple[str, ...]
    frame_stack: int


def load_robomimic(path: str | Path) -> RobomimicCheckpoint:
    """Load a ``.pth`` file that robomimic's training wrote, on the CPU.

    It is a pickle, as robomimic makes them: load only what you trust.

    Raises:
        CheckpointError: the file cannot be read as such, or the policy sees what a learned world does not show.
        MissingExtra: robomimic is not installed.
    """
    files = import_robomimic("robomimic.utils.file_utils", purpose=_PURPOSE)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=False)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the observations that it sees
            rollout_policy, _ = files.policy_from_checkpoint(device=torch.device("cpu"), ckpt_dict=loaded)
    except (OSError, EOFError, pickle.UnpicklingError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a checkpoint of robomimic ({type(error).__name__}: {error}); give a .pth "
            "file that its training wrote."
        ) from error
    config = rollout_policy.policy.global_config
    modalities = config.observation.modalities.obs
    images, low_dim = list(modalities.rgb), list(modalities.low_dim)
    foreign = [key for key in low_dim if key not in _PARTS] + images[1:] + [*modalities.depth, *modalities.scan]
    if foreign:
        raise CheckpointError(
            f"{str(path)!r} needs the observations {foreign}; a learned environment shows one camera and agent_pos "
            f"({', '.join(_PARTS)}): train on these."
        )
    shapes = loaded["shape_metadata"]["all_shapes"]
    return RobomimicCheckpoint(
        algorithm=str(loaded["algo_name"]) + ("-rnn" if config.algo.get("rnn", {}).get("enabled", False) else ""),
        rollout_policy=rollout_policy,
        image_key=images[0] if images else None,
        image_size=(int(shapes[images[0]][-2]), int(shapes[images[0]][-1])) if images else (0, 0),
        low_dim_keys=tuple(low_dim),
        frame_stack=int(config.train.get("frame_stack", 1)),
    )


@dataclass(frozen=True)
class _Group:
    """Environments whose episodes began at the same time: one batch with one recurrent state."""

    rows: NDArray[np.int64]
    algorithm: Any


class RobomimicPolicy:
    """A robomimic policy for N environments at once, as a :class:`~hma_gym.policies.protocol.Policy`.

    robomimic's own ``RolloutPolicy`` plays one environment and keeps its recurrent state; here each group of
    environments that began together has a copy of the algorithm object, which shares the networks.

    Args:
        checkpoint: from :func:`load_robomimic`; may serve several policies.
        num_envs: N.
    """

    def __init__(self, checkpoint: RobomimicCheckpoint, num_envs: int) -> None:
        self.checkpoint = checkpoint
        self._count = num_envs
        self._groups: dict[int, _Group] = {}
        self._group_N = np.full(num_envs, -1)
        self._began = 0
        self._history: list[dict[str, NDArray[np.float32]]] = []
        self._fresh_N = np.ones(num_envs, dtype=np.bool_)
        self._normalise = import_robomimic("robomimic.utils.obs_utils", purpose=_PURPOSE).normalize_obs

    def reset(self, mask_N: NDArray[np.bool_]) -> None:
        """Begin an episode where ``mask_N`` is true."""
        rows = np.flatnonzero(mask_N)
        if not len(rows):
            return
        algorithm = copy.copy(self.checkpoint.rollout_policy.policy)
        algorithm.set_eval()
        algorithm.reset()
        self._groups[self._began] = _Group(rows, algorithm)
        self._group_N[rows] = self._began
        self._began += 1
        self._fresh_N[rows] = True
        self._groups = {key: group for key, group in self._groups.items() if (self._group_N == key).any()}

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Actions (N, 1, A) from ``pixels`` (N, H, W, 3) uint8 and ``agent_pos`` (N, 9).

        Raises:
            InvalidArgument: an observation is missing or has another size.
        """
        if (self._group_N < 0).any():
            raise InvalidArgument("call reset() for all environments before act().")
        seen = self._stack(self._read(observation))
        actions: NDArray[np.float32] | None = None
        for key, group in self._groups.items():
            batch = {name: torch.from_numpy(np.ascontiguousarray(value[group.rows])) for name, value in seen.items()}
            with torch.no_grad():
                chosen = group.algorithm.get_action(obs_dict=batch).numpy()
            if actions is None:
                actions = np.zeros((self._count, 1, chosen.shape[-1]), np.float32)
            mine = self._group_N[group.rows] == key  # rows that have begun anew since are another group's
            actions[group.rows[mine], 0] = chosen[mine]
        assert actions is not None
        return actions

    def _read(self, observation: Observation) -> dict[str, NDArray[np.float32]]:
        """The observations under robomimic's names, as its networks take them."""
        checkpoint = self.checkpoint
        found: dict[str, NDArray[np.float32]] = {}
        pixels: Any = observation["pixels"] if isinstance(observation, Mapping) else observation
        if checkpoint.image_key is not None:
            images = np.asarray(pixels)
            if images.shape != (self._count, *checkpoint.image_size, 3) or images.dtype != np.uint8:
                raise InvalidArgument(
                    f"this policy of robomimic needs uint8 images {(self._count, *checkpoint.image_size, 3)}, got "
                    f"{images.dtype} {images.shape}."
                )
            found[checkpoint.image_key] = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / 255
        if checkpoint.low_dim_keys:
            if not isinstance(observation, Mapping) or "agent_pos" not in observation:
                raise InvalidArgument(
                    "this policy of robomimic needs observation['agent_pos']; make the environment with "
                    "obs_type='pixels_agent_pos'."
                )
            pose = np.asarray(observation["agent_pos"], dtype=np.float32)
            for key in checkpoint.low_dim_keys:
                found[key] = pose[:, _PARTS[key]]
            if EEF_QUAT in found:  # robosuite's sign, not agent_pos's
                quaternion = found[EEF_QUAT]
                found[EEF_QUAT] = np.where(quaternion[:, 3:] < 0, -quaternion, quaternion)
        statistics = checkpoint.rollout_policy.obs_normalization_stats
        return found if statistics is None else dict(self._normalise(found, obs_normalization_stats=statistics))

    def _stack(self, seen: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """With F > 1 the last F observations, (N, F, ...); an episode's first one stands for those before it."""
        count = self.checkpoint.frame_stack
        if count == 1:
            return seen
        history = [*self._history[1:], seen] if self._history else [seen] * count
        if self._fresh_N.any():
            rows = self._fresh_N
            history = [
                {k: np.where(rows.reshape(-1, *[1] * (v.ndim - 1)), seen[k], v) for k, v in old.items()}
                for old in history
            ]
            self._fresh_N = np.zeros_like(rows)
        self._history = history
        return {key: np.stack([old[key] for old in history], axis=1) for key in seen}
