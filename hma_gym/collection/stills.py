"""Pictures of recorded states, in part with the object put elsewhere: ``hma-gym data stills FILE [FILE ...]``.

In recordings the object is mostly where a hand left it, so a world learns from them how an arm looks with the object
there. Stills show it arms that were recorded, also without images (``hma-gym collect --roam 1 --no-images``), with the
object anywhere on the table: an arm looks the same wherever the object is.

Stills do not follow one another. They are kept :data:`STILLS_EACH` to an episode that says so (see
:data:`hma_gym.data.episodes.STILL`), and whatever is learned from motion leaves them out. Episode i is a function of
the files, the seed and i: an interrupted run goes on where it stopped.

Shape legend: F recorded states, K states in which the object lies, S state dims (time, qpos, qvel), T rows of an
episode of stills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hma_gym.collection.importer import (
    Joint,
    check_same_control,
    check_same_place,
    joints_of,
    recorded_states,
    show_states,
    task_of,
)
from hma_gym.data.episodes import EEF_POS, STILL, Episode, agent_pos_from_obs
from hma_gym.data.robomimic_hdf5 import Dataset, EpisodeWriter, open_dataset
from hma_gym.envs.simulation import Simulation
from hma_gym.errors import InvalidArgument

STILLS_EACH = 60
"""Stills of an episode; the last one has what is left."""

LYING, LYING_WITHIN = 0.1, 0.01
"""The object lies where its height is within so many metres of this quantile of its recorded heights."""

WIDER = 0.1
"""So much further (m) than it was recorded, to every side, the object may be put."""

DEEPEST = 0.002
"""An object put elsewhere is in nothing deeper than this (m)."""

TRIES = 100
"""Places that are tried for the object before it stays where it was recorded."""


@dataclass(frozen=True)
class StillsConfig:
    """What to picture.

    Attributes:
        files: datasets of one task with MuJoCo states, with images or without. Leave out what was recorded for
            evaluation only.
        out: the file to write; by default the first of the files with ``_stills`` added to its name. An interrupted
            run goes on where it stopped.
        every: take every so many rows of each episode.
        moved: share of the pictures in which the object is put elsewhere, 0 to 1: half of them to where it lies in
            another recorded row, half to anywhere on the table.
        seed: of the places.
        image_size: height and width of the images in pixels.
    """

    files: tuple[Path, ...]
    out: Path | None = None
    every: int = 4
    moved: float = 0.5
    seed: int = 0
    image_size: int = 64

    def __post_init__(self) -> None:
        if not self.files:
            raise InvalidArgument("files must name one or more datasets, got none.")
        for name, low in (("every", 1), ("seed", 0), ("image_size", 8)):
            value = getattr(self, name)
            if value < low:
                raise InvalidArgument(f"{name} must be at least {low}, got {value}.")
        if not 0 <= self.moved <= 1:
            raise InvalidArgument(f"moved must be a share in [0, 1], got {self.moved}.")


def make_stills(config: StillsConfig, *, progress: bool = True) -> Path:
    """Make the pictures that are still missing, then the file; returns its path.

    Raises:
        DatasetError: a file cannot be read, has no states, or is of another task, robot or robosuite model than the
            first or this one; the message says which.
        ResumeError: the output exists and was made with other settings.
        StorageError: the output cannot be written.
        MissingExtra, RenderingUnavailable: the simulation cannot run here.
    """
    sources = [open_dataset(file) for file in config.files]
    task = task_of(sources[0])
    for source in sources:
        check_same_control(source, task)
    simulation = Simulation(task)
    try:
        writer = EpisodeWriter(
            config.out or config.files[0].with_name(f"{config.files[0].stem}_stills.hdf5"),
            env_args=simulation.env_args,
            info={
                "stills": {
                    "files": [file.name for file in config.files],
                    "rows": [int(source.lengths_N.sum()) for source in sources],
                    "every": config.every,
                    "moved": config.moved,
                    "seed": config.seed,
                    "image_size": config.image_size,
                }
            },
        )
        finished = set(writer.finished())
        total = -(-sum(-(-length // config.every) for s in sources for length in s.lengths_N.tolist()) // STILLS_EACH)
        missing = [index for index in range(total) if index not in finished]
        if missing:
            picture = _Photographer(sources, simulation, config)
            initial = total - len(missing)
            disable = not progress
            for index in tqdm(missing, desc="stills", unit="episode", initial=initial, total=total, disable=disable):
                writer.write(index, picture.episode(index))
    finally:
        simulation.close()
    return writer.merge()


class _Photographer:
    """Makes episodes of stills from all recorded states of some files."""

    def __init__(self, sources: Sequence[Dataset], simulation: Simulation, config: StillsConfig) -> None:
        self._simulation, self._config = simulation, config
        self._model_xml = simulation.model_xml
        joints = joints_of(self._model_xml)
        self._object = next(joint for joint in joints if joint.name == simulation.object_joint)
        recorded, chosen = [], []
        for source in sources:
            for position in range(len(source)):
                recorded.append(_states(source, position, joints, simulation))
                chosen.append(recorded[-1][:: config.every])
        self._states_FS = np.concatenate(chosen)
        self._places_K7 = lying(np.concatenate(recorded)[:, self._object.qpos])

    def episode(self, index: int) -> Episode:
        rng = np.random.default_rng([self._config.seed, index])
        recorded_TS = self._states_FS[STILLS_EACH * index :][:STILLS_EACH]
        states_TS = np.stack([self._varied(state_S, rng) for state_S in recorded_TS])
        images_THWC, obs, success_T = show_states(self._simulation, states_TS, self._config.image_size)
        obs = {key: array.astype(np.float32) for key, array in obs.items()}
        return Episode(
            images_THWC=images_THWC,
            agent_pos_TP=agent_pos_from_obs(obs),
            actions_TA=np.zeros((len(states_TS), self._simulation.task.action_dim), np.float32),
            states_TS=states_TS,
            rewards_T=np.roll(success_T, -1),
            dones_T=np.ones(len(states_TS), np.bool_),
            obs=obs,
            attrs={"category": STILL, STILL: True, "model_file": self._model_xml},
        )

    def _varied(self, state_S: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        """The state, or one with the object at rest in another place where it is in nothing."""
        if rng.random() >= self._config.moved:
            return state_S
        for _ in range(TRIES):
            other_S = state_S.copy()
            other_S[self._object.qpos] = another_place(self._places_K7, rng)
            other_S[self._object.qvel] = 0.0
            self._simulation.show(other_S)
            contacts = self._simulation.object_contacts()
            if len(contacts) and contacts.min() >= -DEEPEST:  # it touches what it lies on: beyond the table is nothing
                return other_S
        return state_S


def _states(source: Dataset, position: int, joints: Sequence[Joint], simulation: Simulation) -> NDArray[np.float64]:
    """The states (T, S) of an episode; of the first one of a file also whether its robot stands where this one does."""
    arrays = source.arrays(position)
    states_TS = recorded_states(source, position, arrays, joints)
    if position == 0:
        simulation.show(states_TS[0])
        check_same_place(source.demos[0].where, arrays, simulation.observe()[EEF_POS])
    return states_TS


def lying(places_F7: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those of an object's recorded places (position, quaternion wxyz) in which it lies, (K, 7)."""
    height_F = places_F7[:, 2]
    return places_F7[np.abs(height_F - np.quantile(height_F, LYING)) < LYING_WITHIN]


def another_place(lying_K7: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """(7,) position and quaternion wxyz: half and half one of these places, or anywhere about them, upright."""
    if rng.random() < 0.5:
        return lying_K7[rng.integers(len(lying_K7))]
    x, y = rng.uniform(lying_K7[:, :2].min(axis=0) - WIDER, lying_K7[:, :2].max(axis=0) + WIDER)
    half = rng.uniform(-np.pi, np.pi) / 2
    return np.array([x, y, np.median(lying_K7[:, 2]), np.cos(half), 0.0, 0.0, np.sin(half)])
