"""Ground truth row by row: what the simulator knew about each recorded frame.

Shape legend: T rows of an episode, F rows of all chosen episodes end to end, H W image, 3 metres or channels, P
agent_pos dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.data.episodes import Episode, apart, success_of_stills
from hma_gym.data.object_pose import OBJECT_KEY, POSITION
from hma_gym.errors import DatasetError


def success_by_row(episode: Episode) -> NDArray[np.bool_]:
    """Whether the task is done in the state that row t shows: (T,).

    ``rewards_T[t]`` speaks of the state after ``actions_TA[t]``, so it labels row t + 1; nothing is done at row 0, but
    of stills.
    """
    return success_after(episode.rewards_T, episode.still)


def success_after(rewards_T: NDArray[np.float32], still: bool = False) -> NDArray[np.bool_]:
    """:func:`success_by_row` from an episode's rewards alone; ``still`` where its rows are stills."""
    if still:
        return success_of_stills(rewards_T)
    success = np.zeros(len(rewards_T), dtype=np.bool_)
    success[1:] = rewards_T[:-1] > 0
    return success


def object_by_row(episode: Episode) -> NDArray[np.float32]:
    """Where the object is at each row: (T, 3) metres, NaN where the dataset does not tell."""
    if OBJECT_KEY not in episode.obs:
        return np.full((len(episode), 3), np.nan, dtype=np.float32)
    return np.asarray(episode.obs[OBJECT_KEY][:, POSITION], dtype=np.float32)


@dataclass(frozen=True)
class RowLabels:
    """What is known of the rows of N episodes end to end.

    Attributes:
        success_F: whether the task is done in this frame.
        position_F3: where the object is (m), NaN where unknown.
        first_F: the first row of each row's own episode, so that a window never reaches into another one.
        last_N: the last row of each episode.
    """

    success_F: NDArray[np.bool_]
    position_F3: NDArray[np.float32]
    first_F: NDArray[np.int64]
    last_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.success_F)

    def windows(self, rows_B: NDArray[np.int64], window: int) -> NDArray[np.int64]:
        """Indices (B, window) of the last ``window`` rows up to each given row; an episode's first row repeats."""
        back_K = np.arange(1 - window, 1)
        return np.maximum(rows_B[:, None] + back_K, self.first_F[rows_B][:, None])

    def near(self, height: float | None, reach: float = 0.03) -> NDArray[np.int64]:
        """Rows whose object is within ``reach`` of a height (m), where the errors are.

        Without heights, those with success: success and failure in equal parts is the next best balance.
        """
        near_F = np.zeros(len(self), dtype=bool)
        if height is not None:
            near_F = np.abs(np.nan_to_num(self.position_F3[:, 2], nan=np.inf) - height) < reach
        return np.flatnonzero(near_F if near_F.any() else self.success_F)

    def draw(self, near: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """So many rows: half of them of those near (:meth:`near`), if there are any, and half of all."""
        chosen_B = generator.integers(0, len(self), count)
        if len(near):
            chosen_B[: count // 2] = generator.choice(near, count // 2)
        return chosen_B


@dataclass(frozen=True)
class LabelledRows(RowLabels):
    """Rows with what was seen and felt.

    Attributes:
        frames_FHWC: uint8.
        agent_pos_FP: own units; P = 0 where it is not known, or the episodes are of different robots.
    """

    frames_FHWC: NDArray[np.uint8]
    agent_pos_FP: NDArray[np.float32]

    def first(self, count: int) -> LabelledRows:
        """The first so many rows, which are whole episodes."""
        return LabelledRows(
            frames_FHWC=self.frames_FHWC[:count],
            agent_pos_FP=self.agent_pos_FP[:count],
            success_F=self.success_F[:count],
            position_F3=self.position_F3[:count],
            first_F=self.first_F[:count],
            last_N=self.last_N[self.last_N < count],
        )


@dataclass(frozen=True)
class TokenRows(RowLabels):
    """Rows with their frames' tokens. ``tokens_F``: (F, S, C) floating or (F, S) integers."""

    tokens_F: NDArray[Any]


def label_rows(episodes: Sequence[Episode]) -> LabelledRows:
    """Put episodes end to end, each still as one of its own. Raises :class:`DatasetError` when there is none."""
    if not episodes:
        raise DatasetError("no episode to label; choose at least one.")
    episodes = apart(episodes)
    dims = {episode.agent_pos_TP.shape[1] for episode in episodes}
    told = min(dims) if len(dims) == 1 else 0
    first_F, last_N = bounds_of(np.array([len(episode) for episode in episodes]))
    return LabelledRows(
        frames_FHWC=np.concatenate([episode.images_THWC for episode in episodes]),
        agent_pos_FP=np.concatenate([episode.agent_pos_TP[:, :told] for episode in episodes]),
        success_F=np.concatenate([success_by_row(episode) for episode in episodes]),
        position_F3=np.concatenate([object_by_row(episode) for episode in episodes]),
        first_F=first_F,
        last_N=last_N,
    )


def bounds_of(lengths_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``first_F`` and ``last_N`` of episodes of these lengths, end to end."""
    starts = np.concatenate([[0], np.cumsum(lengths_N)])
    return np.repeat(starts[:-1], lengths_N), starts[1:] - 1
