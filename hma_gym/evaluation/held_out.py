"""Held-out episodes as arrays: the truth that generated videos are measured against.

Shape legend: B episodes, T rows (the same number for all), H W C image, P agent_pos dims, A action dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import Dataset
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.judges.rows import object_by_row, success_by_row


@dataclass(frozen=True)
class HeldOut:
    """Recorded episodes of one length.

    Attributes:
        names: demo names in the dataset.
        frames_BTHWC: uint8.
        agent_pos_BTP: float32.
        actions_BTA: float32; the last row's action leads out of the recording.
        success_BT: whether the task is done in each row's state, as the simulator says.
        object_BT3: where the object is (m), NaN where unknown.
        categories: what became of each episode up to its last row here (see :func:`category_at_end`).
    """

    names: tuple[str, ...]
    frames_BTHWC: NDArray[np.uint8]
    agent_pos_BTP: NDArray[np.float32]
    actions_BTA: NDArray[np.float32]
    success_BT: NDArray[np.bool_]
    object_BT3: NDArray[np.float32]
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def rows(self) -> int:
        """T, rows of each episode; a rollout from row 0 has T - 1 steps."""
        return self.frames_BTHWC.shape[1]


def category_at_end(success_T: NDArray[np.bool_], recorded: str) -> str:
    """``held`` with success in the last row, ``dropped`` with success in an earlier row only, else what was intended.

    Episodes are cut to one length, so the recorded category (of the whole episode) holds only where it agrees; an
    episode recorded as held or dropped that has not succeeded by the cut counts as ``other``.
    """
    if success_T[-1]:
        return "held"
    if success_T.any():
        return "dropped"
    return recorded if recorded not in ("held", "dropped") else "other"


def load_held_out(dataset: Dataset, *, split: str | None, episodes: int, rows: int, seed: int = 0) -> HeldOut:
    """Read up to ``episodes`` episodes of a split (None: of the whole dataset), cut to ``rows`` rows.

    Drawn at random with the seed, evenly over the whole split, so that shares and rates are the collection's own.
    Stills, whose rows do not follow one another, are never among them.

    Raises:
        DatasetError: the split has no episode that long.
        InvalidArgument: fewer than 1 episode or 2 rows asked for.
    """
    if episodes < 1 or rows < 2:
        raise InvalidArgument(f"need episodes >= 1 and rows >= 2, got episodes={episodes}, rows={rows}.")
    lengths = dataset.lengths_N
    members = dataset.moving(None if split is None else dataset.split(split))
    long_enough = [position for position in members if lengths[position] >= rows]
    if not long_enough:
        raise DatasetError(
            f"{str(dataset.path)!r}: no episode of split {split!r} has {rows} rows; the longest of the file has "
            f"{max((int(lengths[p]) for p in dataset.moving()), default=0)}: ask for fewer steps."
        )
    order = np.random.default_rng(seed).permutation(long_enough)[:episodes]
    chosen = [int(position) for position in sorted(order)]
    return stack_episodes([dataset.demos[p].name for p in chosen], [dataset[p] for p in chosen], rows)


def stack_episodes(names: Sequence[str], episodes: Sequence[Episode], rows: int) -> HeldOut:
    """Episodes of at least ``rows`` rows each, cut and stacked."""
    success = np.stack([success_by_row(episode)[:rows] for episode in episodes])
    recorded = [str(episode.attrs.get("category", "other")) for episode in episodes]
    return HeldOut(
        names=tuple(names),
        frames_BTHWC=np.stack([episode.images_THWC[:rows] for episode in episodes]),
        agent_pos_BTP=np.stack([episode.agent_pos_TP[:rows] for episode in episodes]),
        actions_BTA=np.stack([episode.actions_TA[:rows] for episode in episodes]),
        success_BT=success,
        object_BT3=np.stack([object_by_row(episode)[:rows] for episode in episodes]),
        categories=tuple(category_at_end(s, r) for s, r in zip(success, recorded, strict=True)),
    )
