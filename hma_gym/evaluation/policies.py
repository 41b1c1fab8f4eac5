"""Policies in a learned world and in ground truth, from the same starts: ``hma-gym evaluate``.

    hma-gym evaluate --policies A=runs/policy/step-0001000 B=bc.pth --envs HMA-Lift-v0 GroundTruth-Lift-v0 --out RUN

The same from Python::

    report = evaluate(EvaluateConfig(policies=("A=runs/policy/step-0001000", "random"), out=Path("RUN")))

Episode ``start`` of a policy begins at start ``start`` of the checkpoint's bank in every environment, with a seed that
is a function of it. In a learned environment a fixed group of episodes is one batch; in ground truth each is played by
itself, in worker processes. Everything finished is on disk: killed at any moment, the same call goes on, and ends with
the same results.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from tqdm import tqdm

from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.envs.tasks import get_task
from hma_gym.errors import InvalidArgument, PolicyError, UnknownName
from hma_gym.evaluation.episode_store import EpisodeResult, EpisodeStore, check_label
from hma_gym.evaluation.policy_report import Run, write_report
from hma_gym.evaluation.workers import Job, Stage, label_key, run_jobs
from hma_gym.judges.human import LabelQueue
from hma_gym.judges.labels import FILE_NAME
from hma_gym.judges.registry import get_step_judge
from hma_gym.policies.loading import EpisodeSeed, PolicyFactory, load_policy, split_label

CLASSIFIER, FEATURE, HUMAN = "classifier", "feature", "human"
LABELS_FOLDER = "labels"


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation.

    Attributes:
        policies: each ``SPEC`` or ``LABEL=SPEC``; see :mod:`hma_gym.policies.loading`: the folder of a diffusion
            policy, a robomimic ``.pth``, ``sb3:PPO:FILE.zip``, ``sighted:MODE:COMPETENCE:FOLDER``,
            ``python:MODULE:FUNCTION``, ``random``.
        envs: gymnasium ids of one task. A learned one is compared with the (first) ground truth among them.
        episodes: starts for each policy.
        judge: who decides success in learned environments: ``classifier`` or ``feature`` (the checkpoint's own),
            ``human`` (videos wait in ``OUT/labels``; label them with hma-gym serve and repeat the command for the
            report), or the name of a judge that an installed package registers. In ground truth the simulator decides.
        out: the run's folder.
        checkpoint: name, folder or hub id of the learned world and of the bank of starts; None for the task's own.
        first_start: the first start of the bank that is used.
        steps: length of every episode; None for the task's horizon.
        success: ``end``: the verdict at the last frame; ``ever``: at any frame.
        batch: episodes played at once in a learned environment.
        workers: processes for ground truth; None for one per core.
        timeout: seconds after which a policy that does not answer is ended.
        held_out: labels of policies that were held out while the learned world was tuned; reported separately too.
        seed: of the environments and the policies.
        report_videos: pairs of videos in the report, failures first.
        progress: show a progress bar.
    """

    policies: tuple[str, ...]
    out: Path
    envs: tuple[str, ...] = ("HMA-Lift-v0", "GroundTruth-Lift-v0")
    episodes: int = 50
    judge: str = CLASSIFIER
    checkpoint: str | None = None
    first_start: int = 0
    steps: int | None = None
    success: Literal["end", "ever"] = "end"
    batch: int = 25
    workers: int | None = None
    timeout: float = 120.0
    held_out: tuple[str, ...] = ()
    seed: int = 0
    report_videos: int = 30
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("episodes", "batch", "timeout"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("steps", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} must be at least 1 or None, got {value}.")
        if self.first_start < 0 or self.seed < 0 or self.report_videos < 0:
            raise InvalidArgument(
                f"first_start, seed and report_videos must be 0 or more, got {self.first_start}, {self.seed} and "
                f"{self.report_videos}."
            )
        if len(set(self.envs)) != len(self.envs) or not self.envs:
            raise InvalidArgument(f"envs must name each environment once, got {self.envs}.")


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        results: every finished episode of the policies asked for.
        failures: label -> what was wrong with a policy; its finished episodes are among the results.
        report: the HTML page; ``report.json`` and ``episodes.csv`` lie beside it.
    """

    results: tuple[EpisodeResult, ...]
    failures: Mapping[str, PolicyError]
    report: Path


@dataclass(frozen=True)
class _Plan:
    """The configuration, resolved."""

    config: EvaluateConfig
    policies: Mapping[str, str | PolicyFactory]
    families: Mapping[str, str]
    digests: Mapping[str, str]
    checkpoint: Checkpoint
    stages: tuple[Stage, ...]
    episodes: tuple[EpisodeSeed, ...] = field(repr=False)


def evaluate(config: EvaluateConfig, more_policies: Mapping[str, PolicyFactory] | None = None) -> Evaluation:
    """Play what is missing and write the report.

    Args:
        config: what to evaluate.
        more_policies: further policies by label, as factories: functions of a module (worker processes import them)
            that take a sequence of :class:`~hma_gym.policies.loading.EpisodeSeed` and return a
            :class:`~hma_gym.policies.protocol.Policy`. A script that passes some keeps its calls behind
            ``if __name__ == "__main__"``.

    Returns:
        The results, and the failures of policies: one that raises, hangs, ends its process or returns no proper action
        fails, and the others go on.

    Raises:
        InvalidArgument, UnknownName: the configuration breaks a rule.
        ResumeError: ``out`` holds another evaluation.
        StorageError: results cannot be written.
        MissingExtra: ground truth is asked for and MuJoCo is not installed, or a policy's package is not.
    """
    plan = _make_plan(config, more_policies or {})
    store = EpisodeStore(config.out)
    store.agree_on(
        {
            label: {"policy": policy if isinstance(policy, str) else "a factory", "digest": plan.digests[label]}
            for label, policy in plan.policies.items()
        },
        {stage.env: _identity(stage, plan) for stage in plan.stages},
    )
    if config.judge == HUMAN and not (config.out / LABELS_FOLDER / FILE_NAME).exists():
        LabelQueue.create(config.out / LABELS_FOLDER).close()
    failures: dict[str, PolicyError] = {}
    for stage in plan.stages:
        _play(stage, plan, store, failures)
    results = tuple(
        store.read(stage.env, label, episode.start)
        for stage in plan.stages
        for label in plan.policies
        for episode in plan.episodes
        if store.has(stage.env, label, episode.start)
    )
    report = write_report(
        Run(
            out=config.out,
            results=results,
            families=plan.families,
            envs=tuple(stage.env for stage in plan.stages),
            learned=tuple(stage.env for stage in plan.stages if stage.learned),
            success=config.success,
            held_out=config.held_out,
            failures={label: str(error) for label, error in failures.items()},
            verdicts=_people(plan),
            judge=config.judge,
            videos=config.report_videos,
            checkpoint=f"{plan.checkpoint.name} {plan.checkpoint.digest[:16]}",
            digests=plan.digests,
            command=f"{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        )
    )
    return Evaluation(results, failures, report)


def main(config: EvaluateConfig) -> Path:
    """``hma-gym evaluate``: the report's path.

    Raises:
        PolicyError: one or more policies failed; the report holds the others.
    """
    evaluation = evaluate(config)
    if evaluation.failures:
        said = " ".join(f"{error}." for error in evaluation.failures.values())
        raise PolicyError(f"{said} The results of the others are in {evaluation.report}.")
    return evaluation.report


def _make_plan(config: EvaluateConfig, more: Mapping[str, PolicyFactory]) -> _Plan:
    """Check everything that can be checked before anything is played."""
    policies: dict[str, str | PolicyFactory] = {}
    families, digests = {}, {}
    for name in config.policies:
        label, given = split_label(name)
        check_label(label)
        if label in policies:
            raise InvalidArgument(f"policies: the label {label!r} is used twice; give one with LABEL=POLICY.")
        source = load_policy(given)
        policies[label], families[label], digests[label] = given, source.family, source.digest
    for label, factory in more.items():
        check_label(label)
        if label in policies:
            raise InvalidArgument(f"more_policies: the label {label!r} is used twice.")
        try:
            pickled = pickle.dumps(factory)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InvalidArgument(
                f"more_policies[{label!r}] must be a function or class of a module, for worker processes import it, "
                f"got {factory!r} ({error})."
            ) from error
        policies[label], families[label] = factory, "python"
        digests[label] = hashlib.sha256(pickled).hexdigest()[:16]
    if not policies:
        raise InvalidArgument("policies: name at least one policy.")
    unknown = sorted(set(config.held_out) - set(policies))
    if unknown:
        raise UnknownName("held-out policy", ", ".join(unknown), list(policies))
    specs = {env: _spec(env) for env in config.envs}
    tasks = {spec.kwargs["task"] for spec in specs.values()}
    if len(tasks) != 1:
        raise InvalidArgument(f"envs must be of one task, got {sorted(tasks)} for {config.envs}.")
    task = get_task(tasks.pop())
    source_name = config.checkpoint or task.checkpoint
    if source_name is None:
        raise InvalidArgument(f"task {task.key!r} has no checkpoint yet; give one with checkpoint.")
    checkpoint = load_checkpoint(source_name)
    last = config.first_start + config.episodes
    if last > len(checkpoint.starts):
        raise InvalidArgument(
            f"first_start + episodes must be at most {len(checkpoint.starts)}, the size of the bank of checkpoint "
            f"{checkpoint.name!r}, got {last}."
        )
    steps = config.steps or task.horizon
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    own = {CLASSIFIER: checkpoint.judge, HUMAN: checkpoint.judge, FEATURE: checkpoint.feature_judge}
    judge = own[config.judge] if config.judge in own else get_step_judge(config.judge)
    learned_ids = [env for env, spec in specs.items() if spec.vector_entry_point is not None]
    if learned_ids and judge is None:
        raise InvalidArgument(
            f"checkpoint {checkpoint.name!r} has no judge for judge={config.judge!r}, so nobody would decide success "
            f"in {learned_ids}; name a registered one with judge."
        )
    stages = []
    for env, spec in specs.items():
        learned = spec.vector_entry_point is not None
        arguments: dict[str, Any] = {"obs_type": "pixels_agent_pos", "max_episode_steps": steps}
        arguments |= (
            {"checkpoint": source_name, "judge": None if config.judge in (CLASSIFIER, HUMAN) else config.judge}
            if learned
            else {"starts": source_name}
        )
        stages.append(
            Stage(
                env=env,
                learned=learned,
                arguments=arguments,
                steps=steps,
                fps=task.control_hz,
                run=config.out,
                workers=1 if learned else config.workers or cores,
                threads=cores if learned else 1,
                timeout=config.timeout,
                labels=config.out / LABELS_FOLDER if learned and config.judge == HUMAN else None,
            )
        )
    episodes = tuple(
        EpisodeSeed(start, int(np.random.SeedSequence([config.seed, start]).generate_state(1)[0]))
        for start in range(config.first_start, last)
    )
    return _Plan(config, policies, families, digests, checkpoint, tuple(stages), episodes)


def _spec(env: str) -> gymnasium.envs.registration.EnvSpec:
    if env not in gymnasium.registry or "task" not in gymnasium.registry[env].kwargs:
        known = [name for name, spec in gymnasium.registry.items() if "task" in spec.kwargs]
        raise UnknownName("environment", env, known)
    return gymnasium.registry[env]


def _identity(stage: Stage, plan: _Plan) -> dict[str, Any]:
    """What decides the episodes of an environment, beside the policy and the start."""
    starts = plan.checkpoint.starts
    same = {
        "steps": stage.steps,
        "seed": plan.config.seed,
        "starts": hashlib.sha256(starts.states_NS.tobytes() + starts.frames_NHWC.tobytes()).hexdigest()[:16],
    }
    if not stage.learned:
        return same
    of_world = {"checkpoint": plan.checkpoint.digest, "judge": plan.config.judge, "batch": plan.config.batch}
    return {**same, **of_world}


def _play(stage: Stage, plan: _Plan, store: EpisodeStore, failures: dict[str, PolicyError]) -> None:
    """Play the episodes of one environment that are not on disk."""
    size = plan.config.batch if stage.learned else 1
    groups = [plan.episodes[i : i + size] for i in range(0, len(plan.episodes), size)]
    jobs, missing = [], {}
    for label, policy in plan.policies.items():
        for group in groups:
            job = Job(label, policy, group)
            missing[job.label, group[0].start] = sum(not store.has(stage.env, label, e.start) for e in group)
            if missing[label, group[0].start] and label not in failures:
                jobs.append(job)
    total = len(plan.policies) * len(plan.episodes)
    done = total - sum(missing.values())
    with tqdm(total=total, initial=done, unit="episode", desc=stage.env, disable=not plan.config.progress) as bar:
        for job, error in run_jobs(stage, jobs) if jobs else ():
            if error is None:
                bar.update(missing[job.label, job.episodes[0].start])
            elif job.label not in failures:
                failures[job.label] = error
                tqdm.write(f"{error}; going on with the other policies.", file=sys.stderr)


def _people(plan: _Plan) -> dict[tuple[str, str, int], bool | None] | None:
    """What people say of each episode of a learned environment, where they are the judge."""
    if plan.config.judge != HUMAN:
        return None
    with LabelQueue.open(plan.config.out / LABELS_FOLDER) as queue:
        outcomes = queue.outcomes()
    return {
        (stage.env, label, episode.start): outcomes[key].success if key in outcomes else None
        for stage in plan.stages
        if stage.learned
        for label in plan.policies
        for episode in plan.episodes
        for key in [label_key(stage.env, label, episode.start)]
    }
