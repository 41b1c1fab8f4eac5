"""Any function as a policy, and the random one.

Shape legend: N environments, H actions in a chunk, A action dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hma_gym.policies.protocol import Observation


class FunctionPolicy:
    """A function of the observations as a :class:`~hma_gym.policies.protocol.Policy`.

    >>> policy = FunctionPolicy(lambda observation: np.zeros((len(observation["pixels"]), 7)))

    Args:
        function: observations of N environments to their actions, (N, A) or (N, H, A). It remembers nothing; a policy
            with a memory is a class with ``reset`` and ``act``.
    """

    def __init__(self, function: Callable[[Observation], ArrayLike]) -> None:
        self._function = function

    def reset(self, mask_N: NDArray[np.bool_]) -> None:
        """Nothing to forget."""

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The function's actions (N, H, A); (N, A) counts as H = 1."""
        actions = np.asarray(self._function(observation), dtype=np.float32)
        return actions[:, None] if actions.ndim == 2 else actions


class RandomPolicy:
    """Uniform actions in [-1, 1].

    Args:
        seeds: one for each of the N environments; episode k of environment n draws from ``(seeds[n], k)``.
        action_dim: A.
    """

    def __init__(self, seeds: Sequence[int], action_dim: int = 7) -> None:
        self._seeds = [int(seed) for seed in seeds]
        self._action_dim = action_dim
        self._episode_N = np.full(len(self._seeds), -1)
        self._generators = [np.random.default_rng([seed, 0]) for seed in self._seeds]

    def reset(self, mask_N: NDArray[np.bool_]) -> None:
        """Begin the next stream of random numbers where ``mask_N`` is true."""
        for n in np.flatnonzero(mask_N):
            self._episode_N[n] += 1
            self._generators[n] = np.random.default_rng([self._seeds[n], int(self._episode_N[n])])

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """(N, 1, A)."""
        return np.stack([g.uniform(-1, 1, (1, self._action_dim)) for g in self._generators]).astype(np.float32)
