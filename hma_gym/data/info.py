"""What is in a dataset: ``hma-gym data info FILE``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hma_gym.data.robomimic_hdf5 import Dataset, open_dataset


@dataclass(frozen=True)
class InfoConfig:
    """Print what is in a dataset.

    Attributes:
        file: robomimic HDF5 file, or the ``.parts`` folder of one that is being recorded.
    """

    file: Path


@dataclass(frozen=True)
class Group:
    """Episodes that share a value of an attribute: their number and the share that ended in success."""

    value: str
    episodes: int
    success_rate: float | None


@dataclass(frozen=True)
class Summary:
    """What :func:`summarise` found.

    Attributes:
        path: the file or folder.
        episodes, rows: totals, without stills.
        stills: rows that do not follow one another (see :data:`hma_gym.data.episodes.STILL`).
        length_min, length_mean, length_max: rows of an episode; 0 where there are only stills.
        success_rate: share of episodes with success at the last row; None where no demo says.
        by: attribute (``category``, ``mode``, ``policy``) -> its groups, the largest first.
        masks: filter key -> number of demos.
        obs_shapes: observation -> shape of one row.
        action_low, action_high: extremes per action dim over all rows.
        env_args: robomimic's environment description.
        made_by: what made the data, {} for files of others.
        size_bytes: on disk.
    """

    path: Path
    episodes: int
    rows: int
    stills: int
    length_min: int
    length_mean: float
    length_max: int
    success_rate: float | None
    by: dict[str, tuple[Group, ...]]
    masks: dict[str, int]
    obs_shapes: dict[str, tuple[int, ...]]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    env_args: dict[str, Any]
    made_by: dict[str, Any]
    size_bytes: int


def summarise(dataset: Dataset) -> Summary:
    """Count and measure ``dataset``; reads the actions of every demo and no image."""
    moving = dataset.moving()
    successes = [dataset.demos[position].attrs.get("success") for position in moving]
    lengths_N = dataset.lengths_N[moving] if moving else np.zeros(1, np.int64)
    rows = int(lengths_N.sum())
    low_A, high_A = dataset.action_range()
    groups = {
        key: _groups([dataset.demos[position].attrs.get(key) for position in moving], successes)
        for key in ("category", "mode", "policy")
    }
    return Summary(
        path=dataset.path,
        episodes=len(moving),
        rows=rows,
        stills=int(dataset.lengths_N.sum()) - rows,
        length_min=int(lengths_N.min()),
        length_mean=float(lengths_N.mean()),
        length_max=int(lengths_N.max()),
        success_rate=_rate(successes),
        by={key: found for key, found in groups.items() if found},
        masks={key: len(names) for key, names in dataset.masks.items()},
        obs_shapes=dataset.obs_shapes,
        action_low=tuple(low_A.tolist()),
        action_high=tuple(high_A.tolist()),
        env_args=dataset.env_args,
        made_by=dataset.info,
        size_bytes=sum(file.stat().st_size for file in {demo.file for demo in dataset.demos}),
    )


def _rate(successes: Sequence[Any]) -> float | None:
    known = [bool(value) for value in successes if value is not None]
    return float(np.mean(known)) if known else None


def _groups(values: Sequence[Any], successes: Sequence[Any]) -> tuple[Group, ...]:
    counts = Counter(str(value) for value in values if value is not None)
    return tuple(
        Group(name, count, _rate([s for value, s in zip(values, successes, strict=True) if str(value) == name]))
        for name, count in counts.most_common()
    )


def format_summary(summary: Summary) -> str:
    """The summary as a plain-text table."""

    def percent(rate: float | None) -> str:
        return "unknown" if rate is None else f"{100 * rate:.1f} %"

    lines = [
        f"{summary.path} ({summary.size_bytes / 1e6:.1f} MB)",
        f"  environment   {summary.env_args.get('env_name', 'unknown')}"
        f" (robosuite {summary.env_args.get('env_version', 'unknown')})",
        f"  episodes      {summary.episodes} ({summary.rows} rows; "
        f"{summary.length_min} to {summary.length_max} each, mean {summary.length_mean:.1f})",
        *([f"  stills        {summary.stills} (rows that do not follow one another)"] if summary.stills else []),
        f"  success       {percent(summary.success_rate)} at the last row",
        f"  filter keys   {', '.join(f'{key} {count}' for key, count in summary.masks.items())}",
    ]
    for key, groups in summary.by.items():
        width = max(len(group.value) for group in groups)
        lines.append(f"  by {key}")
        lines += [
            f"    {group.value:<{width}}  {group.episodes:>6} episodes  {percent(group.success_rate):>8} success"
            for group in groups
        ]
    width = max((len(key) for key in summary.obs_shapes), default=0)
    lines.append("  observations (one row)")
    lines += [f"    {key:<{width}}  {shape}" for key, shape in sorted(summary.obs_shapes.items())]
    lines.append("  actions")
    lines += [
        f"    dim {dim}  {low:+.3f} to {high:+.3f}"
        for dim, (low, high) in enumerate(zip(summary.action_low, summary.action_high, strict=True))
    ]
    return "\n".join(lines)


def info(config: InfoConfig) -> Summary:
    """Print the summary of ``config.file`` and return it.

    Raises:
        DatasetError: the file cannot be read as a dataset.
    """
    summary = summarise(open_dataset(config.file))
    print(format_summary(summary))
    return summary
