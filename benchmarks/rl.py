"""Does learning in the dream help in the truth? A cloned policy, fine-tuned inside the learned world only, three times.

    hma-gym bench rl --work outputs/rl

makes what is missing and goes on after a kill: demonstrations of a middling script, a cloned policy, its fine-tuning
with each seed, then the same starts for the policy before and after, in both worlds. Reports the true gain over all
seeds and starts, and the exploitation gap (dream minus truth) over training and at the stopping point: the
kept model with the best success in the dream among those whose gap in the run's own small evaluations stayed under
``gap_limit``.

Writes ``<out>/rl_<checkpoint>.json`` and ``.md``. With the default sizes a seed takes some hours of one CPU core.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hma_gym.benchmarks._timing import machine_lines, markdown_table, write_results
from hma_gym.collection.collect import CollectConfig, Ingredient, collect
from hma_gym.data.robomimic_hdf5 import write_atomically
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.policies import EvaluateConfig, evaluate
from hma_gym.evaluation.provenance import provenance
from hma_gym.learning.rl import RLOptions, train_rl
from hma_gym.metrics.statistics import Interval, bootstrap_interval

TRUTH, DREAM = "GroundTruth-Lift-v0", "HMA-Lift-v0"
DEMONSTRATION_SEED = 7002


@dataclass(frozen=True)
class RlConfig:
    """One run of the benchmark.

    Attributes:
        work: folder of the demonstrations, runs and episodes; what is there is used.
        out: folder of the results.
        checkpoint: name, folder or hub id of the learned world.
        algorithm: ``ppo`` or ``sac``.
        demonstrations: how many episodes of the script are cloned; competence: of the script.
        clone_steps, world, steps, critic_steps, num_envs, evaluate_every, episodes, horizon, shaping,
            uncertainty_weight: see :class:`~hma_gym.learning.rl.RLOptions`.
        seeds: of the fine-tuning, one run each; the first is also the clone's.
        test_episodes: starts of the comparison before and after; they follow those of the runs' own evaluations.
        gap_limit: of the exploitation gap at the stopping point.
        workers: processes for ground truth; None for one a core.
        progress: show progress bars.
    """

    work: Path = Path("outputs/rl")
    out: Path = Path("benchmarks/results")
    checkpoint: str = "lift-64"
    algorithm: Literal["ppo", "sac"] = "ppo"
    demonstrations: int = 100
    competence: float = 0.8
    clone_steps: int = 3000
    world: Literal["model", "sketch"] = "model"
    critic_steps: int = 10_000
    steps: int = 100_000
    num_envs: int = 16
    evaluate_every: int = 10_000
    episodes: int = 20
    horizon: int = 63
    shaping: float = 1.0
    uncertainty_weight: float = 0.0
    seeds: tuple[int, ...] = (0, 1, 2)
    test_episodes: int = 100
    gap_limit: float = 0.15
    workers: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InvalidArgument(f"seeds must be different numbers, one or more, got {self.seeds}.")


def stopping_point(rows: list[dict[str, Any]], gap_limit: float) -> int:
    """The step to stop at: the best success in the dream among the steps whose gap is under the limit, the first of
    equals; the smallest gap where none is."""
    trusted = [row for row in rows if row["gap"] < gap_limit]
    if not trusted:
        return int(min(rows, key=lambda row: row["gap"])["step"])
    return int(max(trusted, key=lambda row: row["dream"])["step"])


def run_seed(config: RlConfig, demonstrations: Path, seed: int) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Clone, unless another seed has, and fine-tune: the models before and after, and the run's own evaluations."""
    folder = config.work / f"seed-{seed}"
    clone, first = folder / "clone.zip", config.work / f"seed-{config.seeds[0]}" / "clone.zip"
    if not clone.exists() and first.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(clone, first.read_bytes())
    train_rl(
        RLOptions(
            out=folder,
            checkpoint=config.checkpoint,
            algorithm=config.algorithm,
            clone=demonstrations,
            clone_steps=config.clone_steps,
            world=config.world,
            critic_steps=config.critic_steps,
            steps=config.steps,
            num_envs=config.num_envs,
            evaluate_every=config.evaluate_every,
            episodes=config.episodes,
            horizon=config.horizon,
            rollout=config.horizon,
            shaping=config.shaping,
            uncertainty_weight=config.uncertainty_weight,
            seed=seed,
            progress=config.progress,
        )
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = stopping_point(rows, config.gap_limit)
    return clone, folder / f"step-{step:07d}.zip" if step else clone, rows


def rl(config: RlConfig) -> tuple[Path, Path]:
    """Make what is missing, play, and write; returns the evaluation's report and the table."""
    demonstrations = collect(
        CollectConfig(
            out=config.work / "demonstrations.hdf5",
            episodes=config.demonstrations,
            workers=config.workers or 2,
            seed=DEMONSTRATION_SEED,
            mixture=(Ingredient(1.0, "expert", config.competence, config.competence),),
        ),
        progress=config.progress,
    )
    runs = {seed: run_seed(config, demonstrations, seed) for seed in config.seeds}
    kind = f"sb3:{config.algorithm.upper()}"
    policies = [f"before={kind}:{runs[config.seeds[0]][0]}"]
    policies += [f"after-{seed}={kind}:{after}" for seed, (_, after, _) in runs.items()]
    evaluation = evaluate(
        EvaluateConfig(
            policies=tuple(policies),
            out=config.work / "run",
            envs=(DREAM, TRUTH),
            episodes=config.test_episodes,
            first_start=config.episodes,
            checkpoint=config.checkpoint,
            steps=config.horizon,
            workers=config.workers,
            progress=config.progress,
        )
    )
    for error in evaluation.failures.values():
        raise error
    won: dict[tuple[str, str], dict[int, bool]] = {}
    for result in evaluation.results:
        won.setdefault((result.env, result.policy), {})[result.start] = result.success_end
    return evaluation.report, write_table(config, won, {seed: rows for seed, (_, _, rows) in runs.items()})


def write_table(
    config: RlConfig, won: dict[tuple[str, str], dict[int, bool]], logs: dict[int, list[dict[str, Any]]]
) -> Path:
    """The results as JSON and as a table; returns the latter."""

    def rate(env: str, label: str) -> float:
        return float(np.mean(list(won[env, label].values())))

    rows, gains = [], []
    for seed in config.seeds:
        before, after = won[TRUTH, "before"], won[TRUTH, f"after-{seed}"]
        gains.append([float(after[start]) - float(before[start]) for start in sorted(before)])
        dream, truth = rate(DREAM, f"after-{seed}"), rate(TRUTH, f"after-{seed}")
        stop = stopping_point(logs[seed], config.gap_limit)
        rows.append([seed, rate(TRUTH, "before"), truth, dream, dream - truth, stop])
    gain = bootstrap_interval(np.array(gains).T, lambda rows_: float(np.mean(rows_)))
    curves = [[seed, row["step"], row["dream"], row["truth"], row["gap"]] for seed, log in logs.items() for row in log]
    device = torch.device("cpu")
    text = "\n".join(
        [
            "# Fine-tuning inside the learned world only",
            "",
            f"{config.algorithm.upper()}, {config.test_episodes} starts not used while training, {config.horizon} "
            f"steps, success at the last. True gain over all seeds: {_points(gain)} (bootstrap over starts).",
            "",
            machine_lines(provenance(device), "wall"),
            "",
            markdown_table(["seed", "true before", "true after", "dream after", "gap", "stopped at step"], rows),
            "",
            f"Over training, {config.episodes} starts each time:",
            "",
            markdown_table(["seed", "step", "dream", "truth", "gap"], curves),
        ]
    )
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    content = {"config": plain, "gain": dataclasses.asdict(gain), "seeds": rows, "training": curves}
    return write_results(config.out, f"rl_{Path(config.checkpoint).name}", content, text, device)[1]


def _points(interval: Interval) -> str:
    return f"{100 * interval.value:+.0f} points [{100 * interval.low:+.0f}, {100 * interval.high:+.0f}]"
