"""When episodes end and begin again, for N environments at once: Gymnasium's three autoreset modes, and nothing else.

Knows no network and no image, so that a toy environment can be run through it beside ``SyncVectorEnv``. A vector
environment asks three things of it, in this order:

>>> reset_N, steps_N = episodes.begin(horizon)              # who resets in place of stepping, who runs how far
>>> truncated_N, again_N = episodes.end(steps_N, terminated_N)   # whose time is over, who resets in this very step
>>> episodes.restart(mask_N)                                # after reset() was called for some

Shape legend: N environments.
"""

from __future__ import annotations

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from hma_gym.errors import EnvironmentState, InvalidArgument

Mask = NDArray[np.bool_]


def read_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """The mode itself, or the one with that value ("NextStep", "SameStep", "Disabled")."""
    for known in AutoresetMode:
        if mode in (known, known.value):
            return known
    raise InvalidArgument(f"autoreset_mode must be one of {[m.value for m in AutoresetMode]}, got {mode!r}.")


class Episodes:
    """Where each of N environments is in its episode.

    Args:
        mode: what happens when an episode is over.
        num_envs: N.
        max_episode_steps: episodes are truncated at this length; None for no limit.

    Attributes:
        elapsed_N: int64, steps since the episode began.
        over_N: bool, the episode is over and was not yet followed by a reset.
    """

    def __init__(self, mode: AutoresetMode, num_envs: int, max_episode_steps: int | None) -> None:
        if max_episode_steps is not None and max_episode_steps < 1:
            raise InvalidArgument(f"max_episode_steps must be at least 1 or None, got {max_episode_steps}.")
        self.mode = mode
        self.max_episode_steps = max_episode_steps
        self.elapsed_N: NDArray[np.int64] = np.zeros(num_envs, dtype=np.int64)
        self.over_N: Mask = np.zeros(num_envs, dtype=bool)

    def restart(self, mask_N: Mask) -> None:
        """These environments were reset."""
        self.elapsed_N[mask_N] = 0
        self.over_N[mask_N] = False

    def begin(self, horizon: int) -> tuple[Mask, NDArray[np.int64]]:
        """A step (or a chunk of ``horizon`` steps) begins.

        Returns:
            reset_N: these reset in place of stepping, their actions are ignored (NEXT_STEP only).
            steps_N: int64, how many steps each may run: 0 for those, else the horizon or the rest of the episode.

        Raises:
            EnvironmentState: DISABLED, and an episode is over.
        """
        if self.mode is AutoresetMode.DISABLED and self.over_N.any():
            raise EnvironmentState(
                f"the episodes of environments {np.flatnonzero(self.over_N).tolist()} are over and autoreset is "
                "disabled; call reset(options={'reset_mask': mask}) for them first."
            )
        reset_N = self.over_N.copy()
        self.restart(reset_N)
        steps_N = np.full(len(reset_N), horizon, dtype=np.int64)
        if self.max_episode_steps is not None:
            steps_N = np.minimum(steps_N, self.max_episode_steps - self.elapsed_N)
        steps_N[reset_N] = 0
        return reset_N, steps_N

    def end(self, steps_N: NDArray[np.int64], terminated_N: Mask, lost_N: Mask) -> tuple[Mask, Mask]:
        """The step (or chunk) is over.

        Args:
            steps_N: how many steps each ran.
            terminated_N: the task itself ended the episode.
            lost_N: the model has left what it knows.

        Returns:
            truncated_N: the time is over, or the model lost.
            again_N: these must reset now, within the same step (SAME_STEP only).
        """
        self.elapsed_N += steps_N
        truncated_N = lost_N.copy()
        if self.max_episode_steps is not None:
            truncated_N |= (self.elapsed_N >= self.max_episode_steps) & (steps_N > 0)
        self.over_N = terminated_N | truncated_N
        again_N = self.over_N.copy() if self.mode is AutoresetMode.SAME_STEP else np.zeros_like(self.over_N)
        self.restart(again_N)
        return truncated_N, again_N
