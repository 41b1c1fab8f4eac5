"""The fidelity report on disk: JSON, a Markdown table with the criteria beside the figures, and film strips.

Shape legend: B episodes, T rows, K chosen rows, H W C image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import StorageError
from hma_gym.evaluation.fidelity import FidelityReport, Measured, OutcomeCounts, VideoQuality
from hma_gym.evaluation.held_out import HeldOut
from hma_gym.evaluation.strips import Panel, Strip, draw_sheet
from hma_gym.metrics.statistics import Interval

STRIP_FRAMES = 11
"""Frames in a strip: the first, the last, and evenly between."""

PANELS_PER_SHEET = 8


@dataclass(frozen=True)
class Criterion:
    """A promise and whether the measurement keeps it.

    Attributes:
        text: the promise in words.
        value: what was measured.
        passed: whether it is kept.
    """

    text: str
    value: str
    passed: bool


def judge_criteria(report: FidelityReport) -> list[Criterion]:
    """The project's bar for a shipped checkpoint of Lift, applied to a report."""
    found = [
        Criterion("at least 200 held-out episodes", str(report.episodes), report.episodes >= 200),
        Criterion("mean PSNR 25 dB or better", f"{report.generated.psnr.value:.2f}", report.generated.psnr.value >= 25),
        Criterion(
            "PSNR of the last 10 steps 23 dB or better",
            f"{report.generated.psnr_last.value:.2f}",
            report.generated.psnr_last.value >= 23,
        ),
    ]
    if report.delta_psnr is not None:
        value = report.delta_psnr.value
        found.append(Criterion("delta-PSNR on the last frame 5.0 dB or better", f"{value:.2f}", value >= 5.0))
    if report.agent_pos_error_m is not None:
        value = report.agent_pos_error_m.value
        found.append(Criterion("end effector within 2 cm at the last step", f"{value * 100:.2f} cm", value < 0.02))
    if report.outcomes is not None:
        overall = report.outcomes.overall
        found.append(
            Criterion("outcome agreement 90 % or more", _share(overall.agreement), overall.agreement.value >= 0.90)
        )
        for name, counts in report.outcomes.by_category.items():
            found.append(Criterion(f"{name}: 80 % or more", _share(counts.agreement), counts.agreement.value >= 0.80))
        gap = report.outcomes.rate_gap.value
        found.append(Criterion("success rate within 4 points of the true one", f"{gap * 100:+.1f}", abs(gap) <= 0.04))
    return found


def _share(interval: Interval) -> str:
    return f"{interval.value * 100:.1f} % [{interval.low * 100:.1f}, {interval.high * 100:.1f}]"


def _number(interval: Interval | None, scale: float = 1.0, unit: str = "") -> str:
    if interval is None or math.isnan(interval.value):
        return "-"
    low, high = interval.low * scale, interval.high * scale
    return f"{interval.value * scale:.2f}{unit} [{low:.2f}, {high:.2f}]"


def _video_row(name: str, pick: str, qualities: Sequence[VideoQuality]) -> str:
    return f"| {name} | " + " | ".join(_number(getattr(quality, pick)) for quality in qualities) + " |"


def _outcome_row(name: str, counts: OutcomeCounts, of_truth: OutcomeCounts) -> str:
    return (
        f"| {name} | {counts.episodes} | {_share(counts.agreement)} | {counts.true_successes} | "
        f"{counts.seen_successes} | {counts.false_positives} | {counts.false_negatives} | "
        f"{of_truth.agreement.value * 100:.1f} % |"
    )


def to_markdown(report: FidelityReport, provenance: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The report as a page: criteria, video, control, outcomes, and where it comes from."""
    sources = (report.generated, report.ceiling, report.floor)
    middle = [step for step in (1, 5, 10, 20, 30, 40, 50, report.steps) if step <= report.steps]
    lines = [
        "# Fidelity",
        "",
        f"Open loop from one real frame under the true actions, {report.episodes} held-out episodes, steps 1 to "
        f"{report.steps}; outcomes at row {report.rows - 1}. Intervals are 95 % (bootstrap over episodes; Wilson for "
        "shares).",
        "",
        "| criterion | measured | kept |",
        "| --- | --- | --- |",
        *(f"| {c.text} | {c.value} | {'yes' if c.passed else 'NO'} |" for c in judge_criteria(report)),
        "",
        "## Video",
        "",
        "| | generated | tokenizer's ceiling | copied first frame |",
        "| --- | --- | --- | --- |",
        _video_row("PSNR, dB", "psnr", sources),
        _video_row("PSNR of the last steps, dB", "psnr_last", sources),
        _video_row("foreground PSNR, dB", "foreground_psnr", sources),
        _video_row("foreground PSNR of the last steps, dB", "foreground_psnr_last", sources),
        _video_row("SSIM", "ssim", sources),
        "",
        "| step | " + " | ".join(str(step) for step in middle) + " |",
        "| --- |" + " --- |" * len(middle),
        "| PSNR, dB | " + " | ".join(f"{report.generated.psnr_curve[step - 1]:.1f}" for step in middle) + " |",
    ]
    if report.cube_error_judge_curve_m:
        cells = (f"{report.cube_error_judge_curve_m[step - 1] * 100:.1f}" for step in middle)
        lines.append("| cube error read by the judge, cm | " + " | ".join(cells) + " |")
    if report.agent_pos_error_curve_m:
        cells = (f"{report.agent_pos_error_curve_m[step - 1] * 100:.1f}" for step in middle)
        lines.append("| end-effector error, cm | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Control and state",
        "",
        "| | |",
        "| --- | --- |",
        f"| delta-PSNR on the last frame, dB | {_number(report.delta_psnr)} |",
        f"| end-effector error at the last step, cm | {_number(report.agent_pos_error_m, 100)} |",
        f"| cube error at the last step, read by the judge, cm | {_number(report.cube_error_judge_m, 100)} |",
        f"| the same reading of the real frame, cm | {_number(report.cube_error_judge_floor_m, 100)} |",
        f"| cube error of the model's own prediction, cm | {_number(report.cube_error_targets_m, 100)} |",
        f"| perplexity of the tokens | {_number(report.perplexity)} |",
        "",
    ]
    if report.outcomes is not None and report.outcomes_of_truth is not None:
        of_truth = report.outcomes_of_truth
        lines += [
            "## Outcomes",
            "",
            "| category | episodes | agreement | true successes | seen | false positives | false negatives "
            "| judge on the real video |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            _outcome_row("all", report.outcomes.overall, of_truth.overall),
            *(
                _outcome_row(name, counts, of_truth.by_category[name])
                for name, counts in report.outcomes.by_category.items()
            ),
            "",
            f"Success rate: {report.outcomes.true_rate * 100:.1f} % true, {report.outcomes.seen_rate * 100:.1f} % "
            f"seen; difference {_number(report.outcomes.rate_gap, 100)} points.",
            "",
        ]
    lines += [
        "## Where this comes from",
        "",
        *(f"- {key}: {value}" for key, value in {**provenance, **config}.items()),
        "",
    ]
    return "\n".join(lines)


def strip_columns(rows: int) -> NDArray[np.int64]:
    """The rows shown in a strip."""
    return np.unique(np.linspace(0, rows - 1, STRIP_FRAMES).round().astype(np.int64))


def episode_panel(held_out: HeldOut, measured: Measured, index: int) -> Panel:
    """Truth above generated for one episode, with its verdict."""
    columns = strip_columns(held_out.rows)
    truth = held_out.frames_BTHWC[index]
    generated = np.concatenate([truth[:1], measured.generated.frames_BTHWC[index].numpy()])
    title = f"{held_out.names[index]}  {held_out.categories[index]}"
    if measured.seen_B is not None and measured.probability_B is not None:
        true, seen = bool(held_out.success_BT[index, -1]), bool(measured.seen_B[index])
        word = "agrees" if true == seen else ("FALSE POSITIVE" if seen else "FALSE NEGATIVE")
        title += f"  {word}: true {true}, seen {seen} (p = {measured.probability_B[index]:.2f})"
    return Panel(title, (Strip("MuJoCo", truth[columns]), Strip("learned", generated[columns])))


def write_strips(held_out: HeldOut, measured: Measured, folder: Path, hits_per_category: int = 2) -> list[Path]:
    """Sheets of every miss (``misses_NN.png``) and of the first few hits of each category (``hits_NN.png``)."""
    misses = list(measured.report.misses)
    hits: list[int] = []
    for name in sorted(set(held_out.categories)):
        right = [i for i, category in enumerate(held_out.categories) if category == name and i not in misses]
        hits += right[:hits_per_category]
    captions = [str(row) for row in strip_columns(held_out.rows)]
    written = []
    for kind, chosen in (("misses", misses), ("hits", hits)):
        for page, start in enumerate(range(0, len(chosen), PANELS_PER_SHEET)):
            part = chosen[start : start + PANELS_PER_SHEET]
            panels = [episode_panel(held_out, measured, index) for index in part]
            sheet = draw_sheet(panels, captions, title=f"{kind}: {start + 1} to {start + len(part)} of {len(chosen)}")
            path = folder / f"{kind}_{page:02d}.png"
            sheet.save(path, optimize=True)
            written.append(path)
    return written


def write_report(
    measured: Measured,
    held_out: HeldOut,
    folder: Path,
    *,
    name: str,
    provenance: Mapping[str, Any],
    config: Mapping[str, Any],
) -> Path:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME_strips/`` into ``folder``; returns the Markdown file.

    Raises:
        StorageError: the folder cannot be written.
    """
    content = {
        "benchmark": "fidelity",
        "provenance": dict(provenance),
        "config": dict(config),
        "criteria": [vars(criterion) for criterion in judge_criteria(measured.report)],
        "missed_episodes": [held_out.names[index] for index in measured.report.misses],
        "report": measured.report.to_dict(),
    }
    page = folder / f"{name}.md"
    strips = folder / f"{name}_strips"
    try:
        strips.mkdir(parents=True, exist_ok=True)
        for old in strips.glob("*.png"):
            old.unlink()
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        page.write_text(to_markdown(measured.report, provenance, config))
        write_strips(held_out, measured, strips)
    except OSError as error:
        raise StorageError(f"cannot write the report to {str(folder)!r}: {error}; choose another folder.") from error
    return page
