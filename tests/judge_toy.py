"""A toy task for judges: a red square that is lifted by steps; success is being above a line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter


def toy_episode(seed: int, length: int = 10, size: int = 16) -> Episode:
    """The square rises (or not) from height .80 m by 1 cm a row; success from .84 m on; one pixel a centimetre."""
    generator = np.random.default_rng(seed)
    rises = np.cumsum(generator.integers(-1, 3, length)).clip(0, 8)
    column = int(generator.integers(1, size - 4))
    images = np.full((length, size, size, 3), 200, dtype=np.uint8)
    position = np.zeros((length, 3), dtype=np.float32)
    for t, rise in enumerate(rises):
        top = size - 4 - int(rise)
        images[t, top : top + 3, column : column + 3] = (180, 20, 20)
        position[t] = (column / 100, 0.0, 0.80 + rise / 100)
    success = rises >= 5
    return Episode(
        images_THWC=images,
        agent_pos_TP=np.zeros((length, 9), np.float32),
        actions_TA=np.zeros((length, 7), np.float32),
        states_TS=np.zeros((length, 2)),
        rewards_T=np.append(success[1:], success[-1]).astype(np.float32),
        dones_T=np.zeros(length, bool),
        obs={"object": position},
        attrs={"category": "held" if success[-1] else "near_miss", "success": bool(success[-1])},
    )


def toy_stills(seed: int) -> Episode:
    """The rows of such an episode, shuffled, as stills."""
    episode = toy_episode(seed)
    order = np.random.default_rng(seed).permutation(len(episode))
    success = episode.obs["object"][order, 2] >= 0.845
    return dataclasses.replace(
        episode,
        images_THWC=episode.images_THWC[order],
        rewards_T=np.roll(success, -1),
        obs={"object": episode.obs["object"][order]},
        attrs={"category": "still", "still": True},
    )


def write_toy(path: Path, episodes: list[Episode]) -> Path:
    """A dataset of these."""
    writer = EpisodeWriter(path, env_args={"env_name": "Toy", "type": 1, "env_kwargs": {}}, info={"seed": 0})
    for episode in episodes:
        writer.append(episode)
    return writer.merge()
