"""Record episodes of mixed quality in ground truth: ``hma-gym collect``.

Scripts of all qualities by default; with ``--policies``, policies of yours, closed loop. Their mistakes lead to states
that no script visits, and a learned world that has seen them judges such policies better (the idea of DAgger, Ross et
al. 2011, applied to the world model).

Episode i is a function of (seed, i) alone: its start, its policy and its noise come from generators seeded
with the two. So the same seed gives the same file whatever the number of workers, and an interrupted
collection goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from hma_gym.data.episodes import AttrValue, Episode, agent_pos_from_obs
from hma_gym.data.robomimic_hdf5 import EpisodeWriter
from hma_gym.envs.simulation import Simulation, check_action
from hma_gym.envs.tasks import get_task
from hma_gym.errors import InvalidArgument
from hma_gym.policies.loading import EpisodeSeed, PolicySource, load_policy, split_label
from hma_gym.policies.protocol import WatchingPolicy
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
        images: render them. A file without is made in half the time, and teaches a world's body alone how things
            move.
        policies: policies to record instead of the scripts, in equal shares, as ``hma-gym evaluate`` takes them.
        roam: share of the episodes in which the arm roams anywhere it gets (mode ``roam``), in place of the mixture's:
            what long rollouts and untrained policies do; 0 to 1. Let these be long (``--steps 250``).
        random: likewise the share of independent uniform actions.
        clumsy: likewise the share of a script that sees badly and cannot decide, as cloned policies do.
        action_noise: noise on the actions of ``policies``: each episode draws its standard deviation between 0 and
            this, in env units.
        mixture: which scripts, in which shares (not a command-line option).
    """

    out: Path
    task: str = "lift"
    episodes: int = 400
    workers: int = 2
    seed: int = 0
    steps: int = 64
    image_size: int = 64
    images: bool = True
    policies: tuple[str, ...] = ()
    roam: float = 0.0
    random: float = 0.0
    clumsy: float = 0.0
    action_noise: float = 0.0
    mixture: Annotated[tuple[Ingredient, ...], tyro.conf.Suppress] = DEFAULT_MIXTURE

    def __post_init__(self) -> None:
        if not get_task(self.task).scripted:
            raise InvalidArgument(
                f"task {self.task!r} has no scripted policy to record; "
                "import demonstrations of it with: hma-gym data import FILE"
            )
        for name, low in (("episodes", 1), ("workers", 1), ("seed", 0), ("steps", 2), ("image_size", 8)):
            value = getattr(self, name)
            if value < low:
                raise InvalidArgument(f"{name} must be at least {low}, got {value}.")
        if not 0 <= self.action_noise < math.inf or (self.action_noise and not self.policies):
            raise InvalidArgument(
                f"action_noise must be finite, at least 0, and is for policies only, got {self.action_noise} with "
                f"{len(self.policies)} policies."
            )
        if self.policies and not self.images:
            raise InvalidArgument(
                f"images must be True with policies, which look at them, got False with {len(self.policies)} policies; "
                "without images, record the scripts."
            )
        shares = [part.weight for part in self._besides()]
        extra = sum(shares)
        if not min(shares) >= 0.0 or not extra <= 1.0 or (extra and self.policies):
            raise InvalidArgument(
                "roam, random and clumsy must be shares of at most 1 together, and are for scripts only, got "
                f"{self.roam}, {self.random} and {self.clumsy} with {len(self.policies)} policies."
            )
        weights = [part.weight for part in self.mixture]
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise InvalidArgument(f"mixture needs non-negative weights with a positive sum, got {self.mixture}.")
        for part in self.mixture:
            if part.mode not in MODES or not 0 <= part.competence_low <= part.competence_high <= 1:
                raise InvalidArgument(
                    f"mixture: mode must be one of {sorted(MODES)} and 0 <= competence_low <= competence_high <= 1, "
                    f"got {part}."
                )

    def ingredients(self) -> tuple[Ingredient, ...]:
        """The mixture, with its shares of what was asked for besides."""
        extra = [part for part in self._besides() if part.weight > 0]
        if not extra:
            return self.mixture
        left = (1.0 - sum(part.weight for part in extra)) / sum(part.weight for part in self.mixture)
        rest = [dataclasses.replace(part, weight=left * part.weight) for part in self.mixture]
        return (*(part for part in rest if part.weight > 0), *extra)

    def _besides(self) -> tuple[Ingredient, ...]:
        shares = (("roam", self.roam), ("random", self.random), ("clumsy", self.clumsy))
        return tuple(Ingredient(share, mode) for mode, share in shares)

    def content(self) -> dict[str, Any]:
        """What decides an episode's content, JSON-ready: two collections may share shards if it is equal."""
        fields = dataclasses.asdict(self)
        played = (
            {"policies": list(self.policies), "action_noise": self.action_noise}
            if self.policies
            else {"mixture": [dataclasses.asdict(part) for part in self.ingredients()]}
        )
        seen = {"image_size": self.image_size} if self.images else {"images": False}
        return {key: fields[key] for key in ("task", "seed", "steps")} | seen | played


def draw_policy(config: CollectConfig, index: int) -> ScriptedConfig:
    """The policy of episode ``index``: a draw from the mixture."""
    rng = np.random.default_rng([config.seed, index, 1])
    mixture = config.ingredients()
    weights = np.array([part.weight for part in mixture])
    part = mixture[int(rng.choice(len(weights), p=weights / weights.sum()))]
    bias = rng.normal(0.0, 0.08, 3) if rng.random() < 0.15 else np.zeros(3)
    if part.competence_low == 1.0:
        bias = np.zeros(3)
    return ScriptedConfig(
        mode=part.mode,
        competence=float(rng.uniform(part.competence_low, part.competence_high)),
        bias=(float(bias[0]), float(bias[1]), float(bias[2])),
    )


@dataclass(frozen=True)
class Player:
    """Who plays an episode.

    Attributes:
        act: the next action (A,) in env units; called once a step.
        attrs: what the recorded episode says of it.
        failure: category of an episode that never succeeds.
    """

    act: Callable[[Simulation, NDArray[np.uint8]], NDArray[np.float32]]
    attrs: dict[str, AttrValue]
    failure: str


def scripted_player(config: CollectConfig, index: int) -> Player:
    """The script of episode ``index``, which is told where everything is."""
    policy = draw_policy(config, index)
    script = LiftScript(policy, np.random.default_rng([config.seed, index, 2]))
    return Player(
        lambda simulation, image: script.act(simulation.privileged()),
        {"policy": "scripted_lift", "mode": policy.mode, "competence": policy.competence},
        CATEGORY_OF_FAILURE[policy.mode],
    )


class _ClosedLoop:
    """A policy for one environment, which sees the image and agent_pos, with noise on its actions."""

    def __init__(self, source: PolicySource, seed: EpisodeSeed, noise: float, rng: np.random.Generator) -> None:
        self.policy = source.make([seed])
        self.policy.reset(np.ones(1, dtype=np.bool_))
        self.noise, self.rng = noise, rng
        self.waiting: list[NDArray[np.float32]] = []

    def act(self, simulation: Simulation, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        agent_pos = agent_pos_from_obs(simulation.observe())
        observation = {"pixels": image[None], "agent_pos": agent_pos[None]}
        if not self.waiting:
            self.waiting = list(np.asarray(self.policy.act(observation), dtype=np.float32)[0])
        elif isinstance(self.policy, WatchingPolicy):
            self.policy.observe(observation)
        action = self.waiting.pop(0)
        return np.clip(action + self.noise * self.rng.standard_normal(len(action)), -1.0, 1.0).astype(np.float32)


def closed_loop_player(config: CollectConfig, sources: Sequence[PolicySource], index: int) -> Player:
    """The policy of episode ``index``: they take turns."""
    which = index % len(config.policies)
    rng = np.random.default_rng([config.seed, index, 2])
    noise = float(rng.uniform(0.0, config.action_noise))
    seed = EpisodeSeed(start=index, seed=int(rng.integers(2**31)))
    attrs: dict[str, AttrValue] = {
        "policy": split_label(config.policies[which])[0],
        "policy_digest": sources[which].digest,
        "action_noise": noise,
    }
    return Player(_ClosedLoop(sources[which], seed, noise, rng).act, attrs, "missed")


def record_episode(simulation: Simulation, config: CollectConfig, player: Player, index: int) -> Episode:
    """Run and record episode ``index`` of a collection; the same whatever the simulation did before."""
    start = int(np.random.default_rng([config.seed, index, 3]).integers(2**31))
    unseen = np.zeros((0, 0, 3), dtype=np.uint8)
    simulation.reset(start)
    rows: dict[str, list[Any]] = {key: [] for key in ("image", "action", "state", "reward")}
    observations: list[dict[str, Any]] = []
    for _ in range(config.steps):
        observations.append(simulation.observe())
        rows["image"].append(simulation.render(config.image_size) if config.images else unseen)
        rows["state"].append(simulation.flattened_state())
        action = player.act(simulation, rows["image"][-1])
        simulation.step(check_action(action, simulation.task.action_dim))
        rows["action"].append(action)
        rows["reward"].append(float(simulation.is_success()))
    obs = {key: np.stack([o[key] for o in observations]).astype(np.float32) for key in observations[0]}
    seen = rows["reward"][:-1]  # success in the rows' own images; the last action's outcome has no image
    success, success_ever = bool(seen[-1]), any(seen)
    return Episode(
        images_THWC=np.stack(rows["image"]),
        agent_pos_TP=agent_pos_from_obs(obs),
        actions_TA=np.stack(rows["action"]),
        states_TS=np.stack(rows["state"]),
        rewards_T=np.array(rows["reward"], dtype=np.float32),
        dones_T=np.arange(config.steps) == config.steps - 1,
        obs=obs,
        attrs=player.attrs
        | {
            "category": "held" if success else "dropped" if success_ever else player.failure,
            "success": success,
            "success_ever": success_ever,
            "seed": start,
            "model_file": simulation.model_xml,
        },
    )


def collect(config: CollectConfig, *, progress: bool = True) -> Path:
    """Record the episodes that are still missing, then make the file; returns its path.

    Killed at any moment it loses at most the running episodes; the same call again goes on. A file that is
    finished is extended when more episodes are asked for.

    Args:
        config: what to record.
        progress: show a progress bar on stderr.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
        ResumeError: the file or its parts were recorded with another configuration.
        MissingExtra, RenderingUnavailable: the simulation cannot run here.
    """
    # First of all, so that an unwritable folder or a foreign file is said before anything is simulated.
    writer = _make_writer(config, {})
    done = writer.finished()
    missing = sorted(set(range(config.episodes)) - set(done))
    outcomes: Counter[str] = Counter()
    began = time.monotonic()
    record = _record_here if config.workers == 1 else _record_in_processes
    with tqdm(total=len(done) + len(missing), initial=len(done), unit="episode", disable=not progress) as bar:
        for category in record(config, missing):
            outcomes[category] += 1
            bar.update()
            bar.set_postfix(held=f"{outcomes['held'] / outcomes.total():.0%}", refresh=False)
    if progress and missing:
        rate = len(missing) * config.steps / (time.monotonic() - began)
        counts = ", ".join(f"{count} {category}" for category, count in outcomes.most_common())
        tqdm.write(f"{len(missing)} episodes recorded at {rate:.0f} steps/s: {counts}")
    return writer.merge()


def _make_writer(config: CollectConfig, env_args: Mapping[str, Any]) -> EpisodeWriter:
    return EpisodeWriter(config.out, env_args=env_args, info={"collector": config.content()})


class _Recorder:
    """One process's simulation and writer."""

    def __init__(self, config: CollectConfig) -> None:
        self.config = config
        self.simulation = Simulation(get_task(config.task))
        self.writer = _make_writer(config, self.simulation.env_args)
        self.sources = [load_policy(split_label(name)[1]) for name in config.policies]

    def record(self, index: int) -> str:
        """Record one episode, put it on disk and return its category."""
        config = self.config
        player = closed_loop_player(config, self.sources, index) if config.policies else scripted_player(config, index)
        episode = record_episode(self.simulation, config, player, index)
        self.writer.write(index, episode)
        return str(episode.attrs["category"])


def _record_here(config: CollectConfig, missing: Sequence[int]) -> Iterator[str]:
    """Record in this process; yields each episode's category when it is on disk."""
    if missing:
        recorder = _Recorder(config)
        try:
            yield from map(recorder.record, missing)
        finally:
            recorder.simulation.close()


_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "LP")}  # LP is Mesa's llvmpipe
_recorder: _Recorder | None = None  # in a worker process, from its first episode on


def _record_in_processes(config: CollectConfig, missing: Sequence[int]) -> Iterator[str]:
    """Record in ``config.workers`` processes; yields each episode's category when it is on disk."""
    context = multiprocessing.get_context("spawn")  # a forked child would inherit OpenGL in use
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)  # read by libraries as the workers load them
    try:
        with ProcessPoolExecutor(config.workers, context, _start_worker) as pool:
            try:
                for done in as_completed([pool.submit(_record_in_worker, config, index) for index in missing]):
                    yield done.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker() -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A collector that was killed must not leave workers behind that write on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _record_in_worker(config: CollectConfig, index: int) -> str:
    global _recorder
    if _recorder is None:  # here and not at the start, so that an error reaches the caller as itself
        _recorder = _Recorder(config)
    return _recorder.record(index)
