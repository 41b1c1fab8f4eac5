"""MPC in the learned world, judged in ground truth: without a policy, and over a weak one, from the same starts.

    hma-gym bench mpc --base runs/policy/step-0000750 --work outputs/mpc

plays, in MuJoCo, the base policy, MPC whose candidates include the base policy's own plans, and MPC from noise alone;
the planner sees real frames and agent_pos, and nothing else of the simulator. It goes on after a kill. Then the
planning rate is measured, on one thread. Writes ``<out>/mpc_<checkpoint>.json`` and ``.md``.

Plans are made on the body alone where the checkpoint knows an object. The defaults suit that; on the whole model
(``--dynamics model``), where a candidate costs a hundred times as much, try ``--samples 32 --rounds 2 --elites 6``.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hma_gym.benchmarks._timing import machine_lines, markdown_table, write_results
from hma_gym.data.robomimic_hdf5 import storage_errors, write_atomically
from hma_gym.dynamics.checkpoint import load_checkpoint
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.policies import EvaluateConfig, evaluate
from hma_gym.evaluation.provenance import provenance
from hma_gym.metrics.statistics import Interval, bootstrap_interval, wilson_interval
from hma_gym.policies.loading import EpisodeSeed
from hma_gym.policies.mpc.loading import MPCOptions, mpc_source, on_body
from hma_gym.policies.mpc.policy import MPCPolicy

TRUTH = "GroundTruth-Lift-v0"


@dataclass(frozen=True)
class MpcConfig:
    """One run of the benchmark.

    Attributes:
        work: folder of the episodes; what is there is used.
        out: folder of the results.
        checkpoint: name, folder or hub id of the model to plan with, and of the bank of starts.
        dynamics: what of it is planned on, see :class:`~hma_gym.policies.mpc.loading.MPCOptions`.
        base: the weak policy, see :mod:`hma_gym.policies.loading`; None leaves it out, and MPC over it.
        free: also plan from noise alone.
        episodes, first_start: which starts.
        steps: length of an episode.
        samples, rounds, elites: of iCEM from noise alone; over a policy half the samples do.
        proposals: plans of the policy.
        horizon, execute: steps of a plan, and how many are carried out.
        uncertainty_weight: penalty for steps that the model is unsure of; needs a calibrated checkpoint.
        plans: how many plans the rate is measured over.
        workers: processes; None for one a core.
        timeout: seconds for one plan.
        seed: of the evaluation.
        progress: show progress bars.
    """

    work: Path = Path("outputs/mpc")
    out: Path = Path("benchmarks/results")
    checkpoint: str = "lift-64"
    dynamics: Literal["auto", "body", "model"] = "auto"
    base: str | None = None
    free: bool = True
    episodes: int = 50
    first_start: int = 0
    steps: int = 63
    samples: int = 256
    rounds: int = 3
    elites: int = 24
    proposals: int = 4
    horizon: int = 16
    execute: int = 4
    uncertainty_weight: float = 0.0
    plans: int = 5
    workers: int | None = None
    timeout: float = 600.0
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.base is None and not self.free:
            raise InvalidArgument("base must name a policy, or free be true: there is nothing else to play.")
        if self.plans < 1:
            raise InvalidArgument(f"plans must be at least 1, got {self.plans}.")


def arms(config: MpcConfig) -> dict[str, MPCOptions]:
    """The planners by label."""
    search = {"samples": config.samples, "rounds": config.rounds, "elites": config.elites}
    free = MPCOptions(
        checkpoint=config.checkpoint,
        dynamics=config.dynamics,
        search=search,
        horizon=config.horizon,
        execute=config.execute,
        uncertainty_weight=config.uncertainty_weight,
    )
    result = {"mpc-free": free} if config.free else {}
    if config.base is not None:
        fewer = {**search, "samples": _over_samples(config)}
        result["mpc-over-base"] = dataclasses.replace(
            free, search=fewer, policy=config.base, proposals=config.proposals
        )
    return result


def _over_samples(config: MpcConfig) -> int:
    return max(config.samples // 2, 2 * config.elites)


def measure_rate(config: MpcConfig, options: MPCOptions) -> dict[str, float]:
    """Plans and candidates a second for one environment, on real first frames, one thread, the first plan left out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    starts = load_checkpoint(config.checkpoint).starts
    policy: Any = mpc_source(options).make([EpisodeSeed(0, config.seed)])
    assert isinstance(policy, MPCPolicy)
    seconds, processor = [], []
    for plan in range(config.plans + 1):
        index = plan % len(starts)
        policy.reset(np.array([True]))
        begun, used = time.perf_counter(), time.process_time()
        policy.act({"pixels": starts.frames_NHWC[[index]], "agent_pos": starts.agent_pos_NP[[index]]})
        seconds.append(time.perf_counter() - begun)
        processor.append(time.process_time() - used)
    torch.set_num_threads(threads)
    candidates = policy.rate.candidates / policy.rate.plans
    wall, cpu = float(np.median(seconds[1:])), float(np.median(processor[1:]))
    return {
        "candidates_a_plan": candidates,
        "plans_hz_wall": 1 / wall,
        "plans_hz_cpu": 1 / cpu,
        "control_hz_cpu": options.execute / cpu,
        "candidates_a_second_cpu": candidates / cpu,
        "imagined_steps_a_second_cpu": candidates * policy.horizon / cpu,
    }


def paired_gain(better: Sequence[bool], base: Sequence[bool]) -> Interval:
    """Difference of two success rates over the same starts, with its 95 percent bootstrap interval."""
    difference = np.asarray(better, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    return bootstrap_interval(difference, lambda rows: float(np.mean(rows)))


def mpc(config: MpcConfig) -> tuple[Path, Path]:
    """Play what is missing, measure, and write; returns the evaluation's report and the table."""
    policies = [] if config.base is None else [f"base={config.base}"]
    planners = arms(config)
    for label, options in planners.items():
        path = config.work / f"{label}.json"
        with storage_errors(path):
            config.work.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(dataclasses.asdict(options), indent=1) + "\n").encode())
        policies.append(f"{label}=mpc:{path}")
    evaluation = evaluate(
        EvaluateConfig(
            policies=tuple(policies),
            out=config.work / "run",
            envs=(TRUTH,),
            episodes=config.episodes,
            checkpoint=config.checkpoint,
            first_start=config.first_start,
            steps=config.steps,
            workers=config.workers,
            timeout=config.timeout,
            seed=config.seed,
            progress=config.progress,
        )
    )
    for error in evaluation.failures.values():
        raise error
    outcomes: dict[str, dict[int, bool]] = {}
    for result in evaluation.results:
        outcomes.setdefault(result.policy, {})[result.start] = result.success_end
    rates = {label: measure_rate(config, options) for label, options in planners.items()}
    return evaluation.report, write_table(config, outcomes, rates)


def write_table(config: MpcConfig, outcomes: dict[str, dict[int, bool]], rates: dict[str, dict[str, float]]) -> Path:
    """The results as JSON and as a table; returns the latter."""
    rows: list[list[str]] = []
    policies: dict[str, Any] = {}
    for label, won in outcomes.items():
        success = wilson_interval(sum(won.values()), len(won))
        gain = None
        if "base" in outcomes and label != "base":
            shared = sorted(set(won) & set(outcomes["base"]))
            gain = paired_gain([won[s] for s in shared], [outcomes["base"][s] for s in shared])
        rate = rates.get(label, {})
        policies[label] = {
            "successes": {str(start): value for start, value in sorted(won.items())},
            "success": dataclasses.asdict(success),
            "gain": None if gain is None else dataclasses.asdict(gain),
            "rate": rate,
        }
        rows.append(
            [
                label,
                f"{sum(won.values())} of {len(won)}",
                _percent(success),
                "" if gain is None else _percent(gain),
                f"{rate['candidates_a_plan']:.0f}" if rate else "",
                f"{rate['plans_hz_cpu']:.2f}" if rate else "",
                f"{rate['control_hz_cpu']:.2f}" if rate else "",
                f"{rate['candidates_a_second_cpu']:.1f}" if rate else "",
            ]
        )
    header = [
        "policy",
        "successes",
        "rate",
        "gain over base",
        "candidates a plan",
        "plans/s",
        "actions/s",
        "candidates/s",
    ]
    device = torch.device("cpu")
    loaded = load_checkpoint(config.checkpoint)
    planned_on = "the body alone" if on_body(loaded, config.dynamics) else "the whole model"
    text = "\n".join(
        [
            "# MPC on the learned model, controlling ground truth",
            "",
            f"{TRUTH}, {config.steps} steps, success at the last; the same starts for all. Brackets: 95 percent "
            "(Wilson; bootstrap over starts for the gain). Planning rates on one thread, in processor time.",
            "",
            f"iCEM on {planned_on} of {loaded.name} (digest {loaded.digest[:12]}): plans of {config.horizon} steps, "
            f"{config.execute} carried out; {config.rounds} rounds, the first of {config.samples} samples, over the "
            f"base of {_over_samples(config)} and {config.proposals} plans of its own.",
            "",
            machine_lines(provenance(device), "cpu"),
            "",
            markdown_table(header, rows),
        ]
    )
    content = {"config": _plain(config), "policies": policies}
    return write_results(config.out, f"mpc_{Path(config.checkpoint).name}", content, text, device)[1]


def _plain(config: MpcConfig) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}


def _percent(interval: Interval) -> str:
    return f"{100 * interval.value:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
