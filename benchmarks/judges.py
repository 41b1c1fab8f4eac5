"""The checkpoint's judges side by side: on ground truth, whose outcomes are known, and on generated rollouts.

    hma-gym bench judges --data heldout.hdf5 --split None

On real episodes both judges are measured against the simulator, over all rows and at the last ones. Then the first
``rollouts`` of these episodes are generated from their first frame under the recorded actions, and the judges read the
same rollouts: how often do they agree? Writes ``<out>/judges_<name>.json`` and ``.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hma_gym.benchmarks._timing import markdown_table, write_results
from hma_gym.data.robomimic_hdf5 import open_dataset
from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.envs.world import Context, LearnedWorld
from hma_gym.errors import CheckpointError
from hma_gym.evaluation.held_out import HeldOut, load_held_out
from hma_gym.evaluation.provenance import provenance
from hma_gym.judges.classifier import ClassifierJudge
from hma_gym.judges.feature import FeatureJudge, load_feature_judge
from hma_gym.judges.protocol import ask, windows_at
from hma_gym.metrics.calibration import BinaryReport, binary_report
from hma_gym.metrics.statistics import Interval, wilson_interval

Probabilities = dict[str, NDArray[np.float64]]
"""Of every judge by its name: (B, T)."""


@dataclass(frozen=True)
class JudgesConfig:
    """One run of the benchmark.

    Attributes:
        data: robomimic file or ``.parts`` folder.
        checkpoint: name, folder or hub id, with both judges.
        feature_judge: folder that ``hma-gym train feature-judge`` wrote, in place of the checkpoint's own.
        episodes: how many episodes of the split, drawn at random with the seed.
        rollouts: how many of them are also generated.
        rows: rows of each episode; outcomes are read at the last.
        split: held-out split; None where the whole dataset was kept from training.
        batch: episodes per network call.
        threads: torch threads; None leaves torch's choice.
        seed: of the draw of episodes and of the rollouts.
        out: folder of the results.
        name: of the result files: ``judges_<name>``.
        progress: show progress bars.
    """

    data: Path
    checkpoint: str = "lift-64"
    feature_judge: Path | None = None
    episodes: int = 220
    rollouts: int = 220
    rows: int = 64
    split: str | None = "test"
    batch: int = 32
    threads: int | None = None
    seed: int = 0
    out: Path = Path("benchmarks/results")
    name: str = "lift-64"
    progress: bool = True


@dataclass(frozen=True)
class JudgeReport:
    """One judge on real episodes: over all rows, and at the last ones; and against their truth on generated ones."""

    judge: str
    frames: BinaryReport
    outcomes: BinaryReport
    generated_outcomes: BinaryReport


def _over_windows(read: Callable[[Tensor], Tensor], values_BT: Tensor, window: int) -> NDArray[np.float64]:
    """What a judge says at every row: (B, T)."""
    rows = torch.arange(values_BT.shape[1])
    parts = [read(windows_at(episode[None], rows, window)[0]) for episode in values_BT]
    return torch.stack(parts).double().numpy()


@torch.inference_mode()
def on_real(checkpoint: Checkpoint, frames_BTHWC: Tensor, agent_pos_BTP: Tensor, progress: bool) -> Probabilities:
    """Both judges on recorded episodes, each frame read once."""
    classifier, feature = _judges(checkpoint)
    episodes = tqdm(
        zip(frames_BTHWC, agent_pos_BTP, strict=True),
        desc="real episodes",
        unit="episode",
        total=len(frames_BTHWC),
        disable=not progress,
        leave=False,
    )
    read = (
        (ask(classifier, classifier.code, frames, agent_pos), checkpoint.tokenizer.encode(frames))
        for frames, agent_pos in episodes
    )
    codes, tokens = zip(*read, strict=True)
    return {
        classifier.name: _over_windows(classifier.probability_of_codes, torch.stack(codes), classifier.window),
        feature.name: _over_windows(feature.probability_of_tokens, torch.stack(tokens), feature.window),
    }


@torch.inference_mode()
def on_generated(checkpoint: Checkpoint, held_out: HeldOut, config: JudgesConfig) -> Probabilities:
    """Both judges on rollouts from the episodes' first frames under their actions; row 0 is real."""
    classifier, feature = _judges(checkpoint)
    world = LearnedWorld(checkpoint)
    said: list[Tensor] = []
    tokens: list[Tensor] = []
    count, steps = min(config.rollouts, len(held_out)), held_out.rows - 1
    bar = tqdm(total=count * steps, desc="rollouts", unit="frame", disable=not config.progress, leave=False)
    for begin in range(0, count, config.batch):
        batch = np.arange(begin, min(begin + config.batch, count))
        context = Context(
            held_out.frames_BTHWC[batch, :1],
            np.zeros((len(batch), 0, world.action_size), np.float32),
            held_out.agent_pos_BTP[batch, :1],
        )
        rows = world.begin_from(context, config.seed + batch)
        probability, seen = [world.judged(rows)[0]["success_probability"]], [rows.tokens_NK[:, -1]]
        for t in range(steps):
            action = torch.from_numpy(held_out.actions_BTA[batch, t]).to(world.device)
            rows = world.see(world.step(rows, action, np.ones(len(batch), dtype=bool)), world.window)
            probability.append(world.judged(rows)[0]["success_probability"])
            seen.append(rows.tokens_NK[:, -1])
            bar.update(len(batch))
        said.append(torch.stack(probability, dim=1))
        tokens.append(torch.stack(seen, dim=1))
    bar.close()
    return {
        classifier.name: torch.cat(said).double().numpy(),
        feature.name: _over_windows(feature.probability_of_tokens, torch.cat(tokens), feature.window),
    }


def _judges(checkpoint: Checkpoint) -> tuple[ClassifierJudge, FeatureJudge]:
    if checkpoint.judge is None or checkpoint.feature_judge is None:
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r} must have a classifier and a feature judge to compare; name the folder of "
            "one with feature_judge."
        )
    return checkpoint.judge, checkpoint.feature_judge


def judges(config: JudgesConfig) -> tuple[Path, Path]:
    """Run the benchmark and write its table; returns the paths.

    Raises:
        CheckpointError: a judge is missing.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = load_checkpoint(config.checkpoint)
    if config.feature_judge is not None:
        checkpoint = dataclasses.replace(checkpoint, feature_judge=load_feature_judge(config.feature_judge))
    own = _judges(checkpoint)
    dataset = open_dataset(config.data)
    held_out = load_held_out(dataset, split=config.split, episodes=config.episodes, rows=config.rows, seed=config.seed)
    frames, agent_pos = torch.from_numpy(held_out.frames_BTHWC), torch.from_numpy(held_out.agent_pos_BTP)
    real = on_real(checkpoint, frames, agent_pos, config.progress)
    generated = on_generated(checkpoint, held_out, config)
    truth_BT = held_out.success_BT
    count = len(generated[own[0].name])
    reports = [
        JudgeReport(
            judge.name,
            binary_report(real[judge.name].ravel(), truth_BT.ravel(), judge.threshold),
            binary_report(real[judge.name][:, -1], truth_BT[:, -1], judge.threshold),
            binary_report(generated[judge.name][:, -1], truth_BT[:count, -1], judge.threshold),
        )
        for judge in own
    ]
    verdicts = [generated[judge.name] >= judge.threshold for judge in own]
    together = {"rows": verdicts[0][:, 1:] == verdicts[1][:, 1:], "outcomes": verdicts[0][:, -1] == verdicts[1][:, -1]}
    confusion = {
        f"{own[0].name} {a}, {own[1].name} {b}": int(((verdicts[0][:, -1] == a) & (verdicts[1][:, -1] == b)).sum())
        for a in (True, False)
        for b in (True, False)
    }
    agreement = {name: wilson_interval(int(same.sum()), same.size) for name, same in together.items()}
    text = _text(checkpoint.name, (len(held_out), count, config.rows), reports, agreement, confusion)
    plain = {**asdict(config), "data": config.data.name, "out": config.out.name, "checkpoint": checkpoint.name}
    plain["feature_judge"] = None if config.feature_judge is None else config.feature_judge.name
    content = {
        "benchmark": "judges",
        "config": plain,
        "reports": [asdict(report) for report in reports],
        "agreement": {name: asdict(interval) for name, interval in agreement.items()},
        "confusion": confusion,
    }
    print(text)
    return write_results(config.out, f"judges_{config.name}", content, text, torch.device("cpu"))


def _text(
    name: str,
    counts: tuple[int, int, int],
    reports: list[JudgeReport],
    agreement: dict[str, Interval],
    confusion: dict[str, int],
) -> str:
    """The page; ``counts`` are real episodes, rollouts, and rows of each."""
    facts = provenance(torch.device("cpu"))
    lines = [
        (
            report.judge,
            *(
                f"{100 * value:.1f} %"
                for part in (report.frames, report.outcomes)
                for value in (part.accuracy, part.precision, part.recall)
            ),
            f"{report.frames.brier:.4f}, {report.outcomes.brier:.4f}",
            f"{report.frames.expected_calibration_error:.4f}",
            f"{100 * report.generated_outcomes.accuracy:.1f} %",
        )
        for report in reports
    ]
    header = (
        *("judge", "frames: accuracy", "precision", "recall", "outcomes: accuracy", "precision", "recall"),
        *("Brier: frames, outcomes", "calibration error", "outcomes of rollouts as in truth"),
    )
    rows, outcomes = (
        f"{100 * found.value:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        for found in (agreement["rows"], agreement["outcomes"])
    )
    return "\n\n".join(
        (
            f"# The judges of {name}",
            f"Commit {facts['commit']}, {facts['date']}. {counts[0]} real episodes of {counts[2]} rows, {counts[1]} "
            "rollouts from their first frames under their actions. Intervals: 95 percent, rows taken as independent.",
            markdown_table(header, lines),
            f"On the rollouts the two agree in {rows} of the rows and {outcomes} of the outcomes: "
            + "; ".join(f"{said}: {number}" for said, number in confusion.items())
            + ".",
        )
    )
