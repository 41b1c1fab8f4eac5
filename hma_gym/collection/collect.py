"""Record episodes of mixed quality in ground truth: ``hma-gym collect``.

Episode i is a function of (seed, i) alone: its start, its policy and its noise come from generators seeded
with the two. So the same seed gives the same file whatever the number of workers, and an interrupted
collection goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hma_gym.data.episodes import Episode, agent_pos_from_obs
from hma_gym.data.robomimic_hdf5 import EpisodeWriter
from hma_gym.envs.simulation import Simulation, check_action
from hma_gym.envs.tasks import get_task
from hma_gym.errors import InvalidArgument
from hma_gym.policies.scripted import CATEGORY_OF_FAILURE, MODES, LiftScript, ScriptedConfig


@dataclass(frozen=True)
class Ingredient:
    """One part of the mixture.

    Attributes:
        weight: share of the episodes; weights need not sum to 1.
        mode: mode of the scripted policy.
        competence_low, competence_high: competence is drawn uniformly between them.
    """

    weight: float
    mode: str
    competence_low: float = 1.0
    competence_high: float = 1.0


DEFAULT_MIXTURE: tuple[Ingredient, ...] = (
    Ingredient(0.10, "expert"),
    Ingredient(0.29, "expert", 0.3, 0.95),
    Ingredient(0.20, "near_miss"),
    Ingredient(0.19, "drop"),
    Ingredient(0.07, "premature_close"),
    Ingredient(0.05, "push"),
    Ingredient(0.04, "wander"),
    Ingredient(0.06, "switch"),
)
"""About 42 percent of the episodes end in success; the rest fail in every way that a policy does."""


@dataclass(frozen=True)
class CollectConfig:
    """What to record.

    Attributes:
        out: the dataset file (``.hdf5``); finished episodes wait in ``OUT.parts`` until all are there.
        task: key of the task table.
        episodes: number of episodes.
        workers: processes, one core each.
        seed: with the episode's number it decides everything in an episode.
        steps: T, rows per episode.
        image_size: height and width of the images in pixels.
        mixture: which policies, in which shares.
    """

    out: Path
    task: str = "lift"
    episodes: int = 400
    workers: int = 2
    seed: int = 0
    steps: int = 64
    image_size: int = 64
    mixture: tuple[Ingredient, ...] = DEFAULT_MIXTURE

    def __post_init__(self) -> None:
        get_task(self.task)
        for name, low in (("episodes", 1), ("workers", 1), ("seed", 0), ("steps", 2), ("image_size", 8)):
            value = getattr(self, name)
            if value < low:
                raise InvalidArgument(f"{name} must be at least {low}, got {value}.")
        weights = [part.weight for part in self.mixture]
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise InvalidArgument(f"mixture needs non-negative weights with a positive sum, got {self.mixture}.")
        for part in self.mixture:
            if part.mode not in MODES or not 0 <= part.competence_low <= part.competence_high <= 1:
                raise InvalidArgument(
                    f"mixture: mode must be one of {sorted(MODES)} and 0 <= competence_low <= competence_high <= 1, "
                    f"got {part}."
                )

    def content(self) -> dict[str, Any]:
        """What decides an episode's content, JSON-ready: two collections may share shards if it is equal."""
        fields = dataclasses.asdict(self)
        return {key: fields[key] for key in ("task", "seed", "steps", "image_size")} | {
            "mixture": [dataclasses.asdict(part) for part in self.mixture]
        }


def draw_policy(config: CollectConfig, index: int) -> ScriptedConfig:
    """The policy of episode ``index``: a draw from the mixture."""
    rng = np.random.default_rng([config.seed, index, 1])
    weights = np.array([part.weight for part in config.mixture])
    part = config.mixture[int(rng.choice(len(weights), p=weights / weights.sum()))]
    bias = rng.normal(0.0, 0.08, 3) if rng.random() < 0.15 else np.zeros(3)
    if part.competence_low == 1.0:
        bias = np.zeros(3)
    return ScriptedConfig(
        mode=part.mode,
        competence=float(rng.uniform(part.competence_low, part.competence_high)),
        bias=(float(bias[0]), float(bias[1]), float(bias[2])),
    )


def record_episode(simulation: Simulation, config: CollectConfig, index: int) -> Episode:
    """Run and record episode ``index`` of a collection; the same whatever the simulation did before."""
    policy = draw_policy(config, index)
    script = LiftScript(policy, np.random.default_rng([config.seed, index, 2]))
    start = int(np.random.default_rng([config.seed, index, 3]).integers(2**31))
    simulation.reset(start)
    rows: dict[str, list[Any]] = {key: [] for key in ("image", "action", "state", "reward")}
    observations: list[dict[str, Any]] = []
    for _ in range(config.steps):
        observations.append(simulation.observe())
        rows["image"].append(simulation.render(config.image_size))
        rows["state"].append(simulation.flattened_state())
        action = script.act(simulation.privileged())
        simulation.step(check_action(action, simulation.task.action_dim))
        rows["action"].append(action)
        rows["reward"].append(float(simulation.is_success()))
    obs = {key: np.stack([o[key] for o in observations]).astype(np.float32) for key in observations[0]}
    seen = rows["reward"][:-1]  # success in the rows' own images; the last action's outcome has no image
    success, success_ever = bool(seen[-1]), any(seen)
    category = "held" if success else "dropped" if success_ever else CATEGORY_OF_FAILURE[policy.mode]
    return Episode(
        images_THWC=np.stack(rows["image"]),
        agent_pos_TP=agent_pos_from_obs(obs),
        actions_TA=np.stack(rows["action"]),
        states_TS=np.stack(rows["state"]),
        rewards_T=np.array(rows["reward"], dtype=np.float32),
        dones_T=np.arange(config.steps) == config.steps - 1,
        obs=obs,
        attrs={
            "policy": "scripted_lift",
            "mode": policy.mode,
            "competence": policy.competence,
            "category": category,
            "success": success,
            "success_ever": success_ever,
            "seed": start,
            "model_file": simulation.model_xml,
        },
    )


def collect(config: CollectConfig, *, progress: bool = True, merge: bool = True) -> Path:
    """Record the episodes that are still missing, then make the file; returns its path.

    Killed at any moment it loses at most the running episodes; the same call again goes on.

    Args:
        config: what to record.
        progress: show a progress bar on stderr.
        merge: make one file of the finished episodes at the end (else they stay in ``OUT.parts``).

    Raises:
        StorageError: the folder cannot be written or the disk is full.
        ResumeError: the file or its parts were recorded with another configuration.
        MissingExtra, RenderingUnavailable: the simulation cannot run here.
    """
    done = _finished(config)
    missing = [index for index in range(config.episodes) if index not in done]
    if config.out.exists() and not missing:
        return config.out
    # The first simulation is built here: what this machine lacks is said once, and before any worker starts.
    simulation = Simulation(get_task(config.task))
    env_args = simulation.env_args
    writer = _writer(config, env_args)
    outcomes: Counter[str] = Counter()
    start = time.monotonic()
    with tqdm(total=config.episodes, initial=len(done), desc="collect", unit="episode", disable=not progress) as bar:
        for category in _run(config, env_args, missing, simulation):
            outcomes[category] += 1
            bar.update()
            bar.set_postfix(held=f"{outcomes['held'] / outcomes.total():.0%}", refresh=False)
    if progress and missing:
        rate = len(missing) * config.steps / (time.monotonic() - start)
        tqdm.write(f"{len(missing)} episodes, {rate:.0f} steps/s; " + json.dumps(dict(outcomes.most_common())))
    return writer.merge() if merge else writer.parts


def _writer(config: CollectConfig, env_args: dict[str, Any]) -> EpisodeWriter:
    return EpisodeWriter(config.out, env_args=env_args, info={"collector": config.content()})


def _finished(config: CollectConfig) -> set[int]:
    return set(_writer(config, {}).finished())


def _run(
    config: CollectConfig, env_args: dict[str, Any], missing: Sequence[int], simulation: Simulation
) -> Iterator[str]:
    """Record ``missing``; yields each episode's category when it is on disk."""
    if config.workers == 1:
        writer = _writer(config, env_args)
        for index in missing:
            episode = record_episode(simulation, config, index)
            writer.write(index, episode)
            yield str(episode.attrs["category"])
        simulation.close()
        return
    simulation.close()
    context = multiprocessing.get_context("spawn")  # a forked child would inherit a used OpenGL library
    with context.Pool(config.workers, _start_worker, (config, env_args)) as pool:
        yield from pool.imap_unordered(_work, missing)


_worker: tuple[CollectConfig, EpisodeWriter, Simulation] | None = None


def _start_worker(config: CollectConfig, env_args: dict[str, Any]) -> None:
    global _worker
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LP_NUM_THREADS"):
        os.environ[name] = "1"
    _worker = (config, _writer(config, env_args), Simulation(get_task(config.task)))


def _work(index: int) -> str:
    assert _worker is not None
    config, writer, simulation = _worker
    episode = record_episode(simulation, config, index)
    writer.write(index, episode)
    return str(episode.attrs["category"])
