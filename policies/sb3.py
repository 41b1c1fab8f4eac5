"""stable-baselines3 models as policies.

Shape legend: N environments, A action dims.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import CheckpointError, UnknownName
from hma_gym.extras import require
from hma_gym.policies.protocol import Observation

_ALGORITHMS = ("A2C", "DDPG", "PPO", "SAC", "TD3")


def load_sb3(algorithm: str, path: str | Path) -> Any:
    """Load a saved model onto the CPU.

    Args:
        algorithm: its class, e.g. ``PPO``; the file does not tell.
        path: the ``.zip`` that ``model.save`` wrote. It holds pickles: load only what you trust.

    Raises:
        UnknownName: no such algorithm with continuous actions.
        CheckpointError: the file is missing, or not such a model.
        MissingExtra: stable-baselines3 is not installed.
    """
    if algorithm not in _ALGORITHMS:
        raise UnknownName("algorithm of stable-baselines3", algorithm, list(_ALGORITHMS))
    package = require("stable_baselines3", extra="rl", purpose="policies of stable-baselines3")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{str(path)!r} is no zip file that stable-baselines3's model.save wrote.")
    try:
        return getattr(package, algorithm).load(path, device="cpu")
    except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as a model of {algorithm} ({type(error).__name__}: {error}); name the "
            "algorithm that it was trained with."
        ) from error


class SB3Policy:
    """A stable-baselines3 model as a :class:`~hma_gym.policies.protocol.Policy`; it acts deterministically.

    Args:
        model: anything with SB3's ``observation_space`` and ``predict(observation, deterministic)``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def reset(self, mask_N: NDArray[np.bool_]) -> None:
        """Nothing to forget: these models have no memory."""

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Actions (N, 1, A); a model of images alone is given ``pixels``, one of a dict the keys that it knows."""
        seen: Any = observation
        if isinstance(observation, Mapping):
            keys = getattr(self._model.observation_space, "spaces", None)  # SB3's Box has none, its Dict does
            seen = observation["pixels"] if keys is None else {key: observation[key] for key in keys}
        actions, _ = self._model.predict(seen, deterministic=True)
        return np.asarray(actions, dtype=np.float32)[:, None]
