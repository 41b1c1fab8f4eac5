"""Does the learned world rank policies as MuJoCo does? A roster of policies in both, from the same starts.

    hma-gym bench policy_evaluation --work outputs/policy_evaluation

It makes what is missing, and goes on after a kill (robomimic's own trainings begin again): 200 demonstrations by the
scripted expert; a diffusion policy on all of them, kept at several stages, and one on an eighth of them; robomimic's BC
and BC-RNN, kept at two stages each; then 50 episodes of every policy in each world.

The demonstrations' seed is not that of the learned world's training data, and no policy of the roster recorded any of
it: its closed-loop episodes are of diffusion policies that were trained with another seed, and of scripts that saw
through one of those. The sighted policies share their scripts with those that did, but not what the scripts are fed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hma_gym.collection.collect import CollectConfig, Ingredient, collect
from hma_gym.data.robomimic_hdf5 import IMAGE_KEY, storage_errors, write_atomically
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.policies import EvaluateConfig, Evaluation, evaluate
from hma_gym.robomimic_compat import import_robomimic
from hma_gym.training.recipes.policy import PolicyOptions, train_policy

DEMONSTRATION_SEED = 7001
POLICY_SEED = 1
_PURPOSE = "the robomimic policies of the roster"


@dataclass(frozen=True)
class PolicyEvaluationConfig:
    """One run of the benchmark.

    Attributes:
        work: folder of the demonstrations, the policies and the episodes; what is there is used.
        out: folder of the summary.
        checkpoint: name, folder or hub id of the learned world.
        demonstrations: to learn from.
        diffusion_steps: optimiser steps of the diffusion policies, the stages of one run: ascending multiples of the
            first.
        robomimic_epochs: of 100 steps each, of the longer BC policy; BC-RNN, whose steps are dearer, has half, and the
            shorter policies have a quarter.
        episodes: starts for each policy.
        steps: length of an episode.
        seed: of the evaluation.
        workers: processes for ground truth and the demonstrations; None for one per core.
        progress: show progress bars.
    """

    work: Path = Path("outputs/policy_evaluation")
    out: Path = Path("benchmarks/results")
    checkpoint: str = "lift-64"
    demonstrations: int = 200
    diffusion_steps: tuple[int, ...] = (500, 1000, 2000, 5000)
    robomimic_epochs: int = 16
    episodes: int = 50
    steps: int = 63
    seed: int = 0
    workers: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        stages = self.diffusion_steps
        ascending = len(stages) > 1 and 0 < stages[0] and list(stages) == sorted(set(stages))
        if not ascending or any(steps % stages[0] for steps in stages):
            raise InvalidArgument(
                f"diffusion_steps must be two or more ascending multiples of the first, got {self.diffusion_steps}."
            )
        if self.robomimic_epochs < 8 or self.robomimic_epochs % 8:
            raise InvalidArgument(f"robomimic_epochs must be a multiple of 8, got {self.robomimic_epochs}.")


@dataclass(frozen=True)
class Entry:
    """One policy of the roster.

    Attributes:
        label: its name in the report.
        spec: see :mod:`hma_gym.policies.loading`.
        held_out: not looked at while the learned world was tuned; reported separately.
    """

    label: str
    spec: str
    held_out: bool = False


def roster(config: PolicyEvaluationConfig) -> tuple[Entry, ...]:
    """Policies of 4 families, 14 with four stages, from useless to expert; one of each learned family is held out."""
    stages = config.diffusion_steps
    (bc_early, bc), (rnn_early, rnn) = (_robomimic_files(config, name) for name in ("bc", "bc_rnn"))

    def diffusion(folder: str, steps: int) -> str:
        return str(config.work / folder / f"step-{steps:07d}")

    eye = diffusion("diffusion", stages[-1])
    return (
        *(Entry(f"diffusion-{steps}", diffusion("diffusion", steps), steps == stages[-2]) for steps in stages),
        Entry("diffusion-few-demos", diffusion("diffusion_few", stages[1])),
        Entry("bc-early", str(bc_early)),
        Entry("bc", str(bc)),
        Entry("bc-rnn-early", str(rnn_early)),
        Entry("bc-rnn", str(rnn), held_out=True),
        Entry("sighted-1.0", f"sighted:expert:1.0:{eye}"),
        Entry("sighted-0.85", f"sighted:expert:0.85:{eye}", held_out=True),
        Entry("sighted-0.7", f"sighted:expert:0.7:{eye}"),
        Entry("sighted-0.5", f"sighted:expert:0.5:{eye}"),
        Entry("random", "random"),
    )


def policy_evaluation(config: PolicyEvaluationConfig) -> tuple[Path, Path]:
    """Make what is missing, play, and write; returns the report and the summary."""
    demonstrations = record_demonstrations(config)
    train_diffusion(config, demonstrations)
    for name, rnn in (("bc", False), ("bc_rnn", True)):
        train_robomimic(config, demonstrations, name, rnn=rnn)
    entries = roster(config)
    evaluation = evaluate(
        EvaluateConfig(
            policies=tuple(f"{entry.label}={entry.spec}" for entry in entries),
            out=config.work / "run",
            episodes=config.episodes,
            checkpoint=config.checkpoint,
            steps=config.steps,
            workers=config.workers,
            held_out=tuple(entry.label for entry in entries if entry.held_out),
            seed=config.seed,
            progress=config.progress,
        )
    )
    return evaluation.report, write_summary(config, evaluation)


def record_demonstrations(config: PolicyEvaluationConfig) -> Path:
    """Episodes of the scripted expert, in ground truth."""
    return collect(
        CollectConfig(
            out=config.work / "demonstrations.hdf5",
            episodes=config.demonstrations,
            workers=config.workers or 2,
            seed=DEMONSTRATION_SEED,
            mixture=(Ingredient(1.0, "expert"),),
        ),
        progress=config.progress,
    )


def train_diffusion(config: PolicyEvaluationConfig, demonstrations: Path) -> None:
    """The diffusion policy on all demonstrations at its stages, and one on an eighth of them."""
    stages = config.diffusion_steps
    for folder, steps, count in (
        ("diffusion", stages[-1], None),
        ("diffusion_few", stages[1], config.demonstrations // 8),
    ):
        train_policy(
            PolicyOptions(
                data=demonstrations,
                out=config.work / folder,
                steps=steps,
                keep_every=stages[0],
                demonstrations=count,
                read_object=True,
                progress=config.progress,
                seed=POLICY_SEED,
            )
        )


def _robomimic_stages(config: PolicyEvaluationConfig, name: str) -> tuple[int, int]:
    """Epochs of the shorter and the longer policy of ``bc`` or ``bc_rnn``."""
    epochs = {"bc": config.robomimic_epochs, "bc_rnn": config.robomimic_epochs // 2}[name]
    return epochs // 4, epochs


def _robomimic_files(config: PolicyEvaluationConfig, name: str) -> tuple[Path, ...]:
    return tuple(config.work / name / f"epoch_{epoch:04d}.pth" for epoch in _robomimic_stages(config, name))


def train_robomimic(config: PolicyEvaluationConfig, demonstrations: Path, name: str, *, rnn: bool) -> None:
    """BC or BC-RNN by robomimic's own training script, on the image and agent_pos."""
    stages, files = _robomimic_stages(config, name), _robomimic_files(config, name)
    if all(file.exists() for file in files):
        return
    settings = _import("config").config_factory("bc")
    settings.experiment.name = name
    settings.experiment.validate = False
    settings.experiment.logging.terminal_output_to_txt = False
    settings.experiment.logging.log_tb = False
    settings.experiment.save.every_n_epochs = stages[0]
    settings.experiment.epoch_every_n_steps = 100
    settings.experiment.rollout.enabled = False  # robomimic 0.3.0 drives robosuite through a package that is gone
    settings.train.data = str(demonstrations)
    settings.train.output_dir = str(config.work / name / "runs")
    settings.train.hdf5_cache_mode = "low_dim"
    settings.train.hdf5_filter_key = "train"
    settings.train.num_epochs = stages[1]
    settings.train.batch_size = 8 if rnn else 32
    settings.train.seq_length = 10 if rnn else 1
    settings.train.cuda = False
    settings.observation.modalities.obs.low_dim = ["agent_pos"]
    settings.observation.modalities.obs.rgb = [IMAGE_KEY]
    settings.observation.encoder.rgb.core_kwargs.backbone_class = "ShallowConv"  # a seventh of ResNet-18's time
    settings.observation.encoder.rgb.core_kwargs.feature_dimension = 64
    settings.algo.optim_params.policy.learning_rate.initial = 1e-3
    settings.algo.actor_layer_dims = () if rnn else (256, 256)
    settings.algo.rnn.enabled = rnn
    settings.algo.rnn.horizon = 10
    settings.algo.rnn.hidden_dim = 200
    settings.algo.gmm.enabled = rnn
    settings.lock()
    torch.manual_seed(config.seed)
    _import("scripts.train").train(settings, device="cpu")
    for epoch, file in zip(stages, files, strict=True):
        made = sorted((config.work / name / "runs").glob(f"{name}/*/models/model_epoch_{epoch}.pth"))
        write_atomically(file, made[-1].read_bytes())


def _import(module: str) -> Any:
    return import_robomimic(f"robomimic.{module}", purpose=_PURPOSE)


def write_summary(config: PolicyEvaluationConfig, evaluation: Evaluation) -> Path:
    """``policy_evaluation_<checkpoint>.md`` beside the same as JSON: the floors, the rates, the speed."""
    content = json.loads(evaluation.report.with_suffix(".json").read_text())
    path = config.out / f"policy_evaluation_{Path(config.checkpoint).name}.md"
    with storage_errors(config.out):
        config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".json"), (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(path, to_markdown(content).encode())
    print(speed_line(content))
    return path


def speed_line(content: dict[str, Any]) -> str:
    """Wall time of the learned-world evaluation against the ground-truth one."""
    seconds = list(content["wall_seconds"].items())
    (learned, first), (truth, second) = seconds[0], seconds[1]
    return f"{learned}: {first:.0f} s of wall time; {truth}: {second:.0f} s; ratio {first / second:.2f}"


def to_markdown(content: dict[str, Any]) -> str:
    """The summary."""
    envs = list(content["wall_seconds"])
    lines = ["# Policies in the learned world and in ground truth", ""]
    for name, comparison in content["comparisons"].items():
        lines += [f"## {name}", "", "| floor | measured | reached |", "| --- | --- | --- |"]
        words = {True: "yes", False: "NO", None: "does not apply"}
        lines += [f"| {c['text']} | {c['value']} | {words[c['kept']]} |" for c in comparison["criteria"]]
        lines += ["", "| measure | value | 95 % interval |", "| --- | --- | --- |"]
        lines += [
            f"| {key} | {_number(v['value'])} | {_number(v['low'])} to {_number(v['high'])} |"
            for key, v in comparison["statistics"].items()
        ]
        lines += [f"| Cohen's kappa | {_number(comparison['kappa'])} | |", ""]
    lines += [
        "## Success",
        "",
        "| policy | family | " + " | ".join(envs) + " |",
        "| --- | --- |" + " --- |" * len(envs),
    ]
    for policy in content["policies"]:
        label = f"{policy['label']} (held out)" if policy["held_out"] else policy["label"]
        cells = " | ".join(_percent(policy["success"][env]) for env in envs)
        lines.append(f"| {label} | {policy['family']} | {cells} |")
    lines += ["", speed_line(content), "", "## Where this comes from", ""]
    facts = {key: content[key] for key in ("command", "checkpoint", "judge", "success")} | content["provenance"]
    lines += [*(f"- {key}: {value}" for key, value in facts.items()), ""]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def _percent(interval: dict[str, float | None]) -> str:
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "none played"
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
