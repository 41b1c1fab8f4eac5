"""One recorded episode in memory, checked when it is made.

Shape legend: T rows (steps), H W C image height, width, 3 channels, A action dims, P agent_pos dims,
S flattened simulator state dims.

Row t holds the observation BEFORE ``actions_TA[t]``; row t+1 is what followed. The last row's action is
recorded and its outcome is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import DatasetError

AttrValue = str | int | float | bool

CATEGORIES = ("held", "dropped", "near_miss", "pushed", "random_walk", "switched", "other")
"""What became of an episode. ``held``: success at the last row; ``dropped``: success before but not at the last
row; else by what the policy set out to do; ``other``: a failure recorded elsewhere, whose intent nobody noted."""

STILL = "still"
"""The category, and the attribute that is true, of stills: rows that show states which do not follow one another, kept
together only because they were made together. See :func:`apart`."""

EEF_POS, EEF_QUAT, GRIPPER = "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"


@dataclass(frozen=True)
class Episode:
    """One episode; arrays of T rows each.

    Attributes:
        images_THWC: uint8 camera frames, upright; H = W = 0 where none were rendered.
        agent_pos_TP: float32 proprioception (see :func:`agent_pos_from_obs`).
        actions_TA: float32 actions in env units.
        states_TS: float64 flattened simulator states; S = 0 where a dataset has none.
        rewards_T: float32 rewards.
        dones_T: bool.
        obs: further observations by robomimic key, T rows each (``robot0_eef_pos``, ``object`` ...).
        attrs: plain values that tell the policy and the outcome: ``policy``, ``mode``, ``competence``,
            ``category``, ``success``, ``success_ever``, ``seed``, ``model_file``.

    Raises:
        DatasetError: shapes or dtypes break these rules, the row counts differ, there is no row, or an action,
            ``agent_pos`` or state is not finite.
    """

    images_THWC: NDArray[np.uint8]
    agent_pos_TP: NDArray[np.float32]
    actions_TA: NDArray[np.float32]
    states_TS: NDArray[np.float64]
    rewards_T: NDArray[np.float32]
    dones_T: NDArray[np.bool_]
    obs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    attrs: Mapping[str, AttrValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images = self.images_THWC
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise DatasetError(
                f"images_THWC must be uint8 of shape (T, H, W, 3), got {images.dtype} {images.shape}; "
                "scale floats to 0..255 and put the channels last."
            )
        if len(self) == 0:
            raise DatasetError("an episode must have at least one row, got 0; drop empty episodes.")
        for name, ndim, dtype in (
            ("agent_pos_TP", 2, np.float32),
            ("actions_TA", 2, np.float32),
            ("states_TS", 2, np.float64),
            ("rewards_T", 1, np.float32),
            ("dones_T", 1, np.bool_),
        ):
            array = np.asarray(getattr(self, name), dtype=dtype)
            object.__setattr__(self, name, array)
            if array.ndim != ndim or len(array) != len(self):
                raise DatasetError(
                    f"{name} must have {ndim} dimensions and {len(self)} rows (as images_THWC), got shape "
                    f"{array.shape}; record one row per step."
                )
            if not np.isfinite(array).all():
                row = int(np.argwhere(~np.isfinite(array))[0, 0])
                raise DatasetError(f"{name} must be finite, got NaN or infinity in row {row}; drop the episode.")
        for key, array in self.obs.items():
            if array.ndim < 1 or len(array) != len(self):
                raise DatasetError(
                    f"obs[{key!r}] must have {len(self)} rows (as images_THWC), got shape {array.shape}; "
                    "record one row per step."
                )

    def __len__(self) -> int:
        """T, the number of rows."""
        return len(self.images_THWC)

    @property
    def still(self) -> bool:
        """Whether the rows are stills (:data:`STILL`)."""
        return bool(self.attrs.get(STILL, False))


def apart(episodes: Iterable[Episode]) -> list[Episode]:
    """Episodes whose rows follow one another: of stills, each row becomes an episode of its own."""
    found: list[Episode] = []
    for episode in episodes:
        if not episode.still or len(episode) == 1:
            found.append(episode)
            continue
        success_T = success_of_stills(episode.rewards_T)
        for t in range(len(episode)):
            row = slice(t, t + 1)
            found.append(
                dataclasses.replace(
                    episode,
                    images_THWC=episode.images_THWC[row],
                    agent_pos_TP=episode.agent_pos_TP[row],
                    actions_TA=episode.actions_TA[row],
                    states_TS=episode.states_TS[row],
                    rewards_T=success_T[row].astype(np.float32),
                    dones_T=episode.dones_T[row],
                    obs={key: array[row] for key, array in episode.obs.items()},
                )
            )
    return found


def success_of_stills(rewards_T: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Whether the task is done in each state, (T,), from the rewards of stills.

    As in any episode ``rewards_T[t]`` speaks of row t + 1; the last one, of which elsewhere no row shows the outcome,
    speaks of row 0.
    """
    return np.roll(rewards_T, 1) > 0


def agent_pos_from_obs(obs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Build agent_pos (..., 9) float32 from robosuite's observations (..., n), of one row or of many.

    The columns are ``robot0_eef_pos`` (3, metres), ``robot0_eef_quat`` (4, xyzw) and ``robot0_gripper_qpos``
    (2, metres). A quaternion and its negative are the same rotation, and robosuite's choice (w >= 0) is noise for
    a gripper that points down, where w is near 0. Here x, the largest component of that pose, is not negative,
    which is continuous within 180 degrees of it and needs no memory of the step before.

    Raises:
        DatasetError: an observation is missing.
    """
    missing = [key for key in (EEF_POS, EEF_QUAT, GRIPPER) if key not in obs]
    if missing:
        raise DatasetError(f"agent_pos needs the observations {missing}, got only {sorted(obs)}; record them too.")
    quat = obs[EEF_QUAT]
    upright = np.where(quat[..., :1] < 0, -quat, quat)
    return np.concatenate([obs[EEF_POS], upright, obs[GRIPPER]], axis=-1, dtype=np.float32, casting="same_kind")
