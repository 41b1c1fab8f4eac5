"""Endurance of a checkpoint: 500-step rollouts under random, scripted and looped actions, checked, on one sheet.

    hma-gym bench endurance --checkpoint lift-64 --data data/lift64.hdf5

20 rollouts take about 2 minutes on 2 CPU cores; with ``--truth``, ground truth is put under the same actions from the
same starts, for 3 minutes more: also there an arm hides the cube at times. Writes
``<out>/endurance_<name>.json`` and ``.png``.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from hma_gym.benchmarks.fidelity import scene_frames
from hma_gym.data.robomimic_hdf5 import Dataset, open_dataset
from hma_gym.dynamics.checkpoint import load_checkpoint
from hma_gym.evaluation.endurance import (
    KINDS,
    EnduranceReport,
    Kind,
    LongRollouts,
    long_rollouts,
    measure_endurance,
    shares,
    static_pixels,
    true_rollouts,
)
from hma_gym.evaluation.held_out import HeldOut, load_held_out
from hma_gym.evaluation.open_loop import Generated, device_of
from hma_gym.evaluation.provenance import provenance
from hma_gym.evaluation.strips import Panel, Strip, draw_sheet
from hma_gym.metrics.video import background_image

SHEET_STEPS = 12


@dataclass(frozen=True)
class EnduranceConfig:
    """One run of the benchmark.

    Attributes:
        data: robomimic file or ``.parts`` folder.
        checkpoint: name, folder or hub id.
        rollouts: how many; an equal share of each kind of actions.
        kinds: of actions; scripts need a checkpoint of Lift that predicts where the cube is.
        rows: rows of the recorded episodes whose actions are looped.
        steps: length of each rollout.
        split: held-out split; None where the whole dataset was kept from training.
        device: where the model runs.
        threads: torch threads; None leaves torch's choice.
        truth: measure ground truth too; needs the extra ``sim``.
        seed: of the draw of episodes, the rollouts and the random actions.
        out: folder of the results.
        name: of the result files: ``endurance_<name>``.
        progress: show a progress bar.
    """

    data: Path
    checkpoint: str = "lift-64"
    rollouts: int = 21
    kinds: tuple[Kind, ...] = KINDS
    rows: int = 64
    steps: int = 500
    split: str | None = "test"
    device: str = "cpu"
    threads: int | None = None
    truth: bool = False
    seed: int = 0
    out: Path = Path("benchmarks/results")
    name: str = "lift-64"
    progress: bool = True


def rollout_sheet_columns(steps: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Steps drawn on the sheet; 0 is the real start."""
    return np.unique(np.linspace(0, steps, SHEET_STEPS).round().astype(np.int64))


def rollout_panels(rollouts: LongRollouts, true: Mapping[Kind, Generated]) -> list[Panel]:
    """One panel per rollout: the real start, then generated frames, and ground truth's below where it was played."""
    columns = rollout_sheet_columns(rollouts.generated.frames_BTHWC.shape[1])
    panels = []
    seen: Counter[str] = Counter()
    for index, name in enumerate(rollouts.names):
        start = rollouts.start_frames_BHWC[index][None]
        strips = [
            Strip(name.replace(" ", "\n"), torch.cat([start, rollouts.generated.frames_BTHWC[index]]).numpy()[columns])
        ]
        kind = cast(Kind, name.split()[0])
        if kind in true:
            frames = torch.cat([start, true[kind].frames_BTHWC[seen[kind]]]).numpy()
            strips.append(Strip("MuJoCo", frames[columns]))
        seen[kind] += 1
        panels.append(Panel("", tuple(strips)))
    return panels


def played_in_truth(
    config: EnduranceConfig, dataset: Dataset, held_out: HeldOut, rollouts: LongRollouts
) -> dict[Kind, Generated]:
    """Ground truth under the same actions from the same starts. Scripts acted on what the model showed, so there they
    move the robot alike, and the cube where it happens to be."""
    place = {demo.name: position for position, demo in enumerate(dataset.demos)}
    true: dict[Kind, Generated] = {}
    for kind, rows in shares(held_out, config.kinds).items():
        states = np.stack([dataset.arrays(place[held_out.names[row]])["states"][0] for row in rows])
        actions, size = rollouts.of_kind(kind).actions_BTA.numpy(), held_out.frames_BTHWC.shape[2]
        true[kind] = true_rollouts("lift", states, actions, size, progress=config.progress)
    return true


def endurance(config: EnduranceConfig) -> dict[str, EnduranceReport]:
    """Run the benchmark, write its files, print its figures; returns a report for each kind of actions."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    checkpoint = load_checkpoint(config.checkpoint, device=config.device)
    dataset = open_dataset(config.data)
    held_out = load_held_out(dataset, split=config.split, episodes=config.rollouts, rows=config.rows, seed=config.seed)
    scene = scene_frames(dataset)
    background = background_image(scene)
    static = static_pixels(scene, background)
    rollouts = long_rollouts(
        checkpoint, held_out, kinds=config.kinds, steps=config.steps, seed=config.seed, progress=config.progress
    )
    true = played_in_truth(config, dataset, held_out, rollouts) if config.truth else {}
    reports: dict[str, EnduranceReport] = {}

    for kind, rows in shares(held_out, config.kinds).items():
        mine, still = rollouts.of_kind(kind), static
        parts = {str(kind): mine}
        if kind in true:  # an arm that goes anywhere also hides what stands still elsewhere
            still = static & static_pixels(true[kind].frames_BTHWC.flatten(0, 1), background)
            parts[f"{kind}, ground truth"] = dataclasses.replace(mine, generated=true[kind])
        for name, part in parts.items():
            reports[name] = measure_endurance(
                part, background_HWC=background, static_HW=still, object_start_B3=held_out.object_BT3[rows, 0]
            )
    config.out.mkdir(parents=True, exist_ok=True)
    plain = {**asdict(config), "data": config.data.name, "out": config.out.name, "checkpoint": checkpoint.name}
    content = {
        "benchmark": "endurance",
        "provenance": provenance(device_of(checkpoint)),
        "config": plain,
        "reports": {kind: asdict(report) for kind, report in reports.items()},
    }
    path = config.out / f"endurance_{config.name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    captions = [str(step) for step in rollout_sheet_columns(config.steps)]
    title = f"{config.steps}-step rollouts of {checkpoint.name}; column 0 is the real start"
    draw_sheet(rollout_panels(rollouts, true), captions, title=title, scale=1.0).save(
        path.with_suffix(".png"), optimize=True
    )
    for name, report in reports.items():
        empty, single, several = report.cube_counts
        print(
            f"{name}: background ({report.static_pixels} pixels) drift {report.background_drift_db:+.2f} dB (worst "
            f"{report.worst_background_drift_db:+.2f}; where it is bare {report.bare_drift_db:+.2f}, worst "
            f"{report.worst_bare_drift_db:+.2f}); arm away in {report.clear_frames} checked frames: no cube "
            f"{empty} (hidden {report.hidden}), one {single}, more {several}; cube area "
            f"{report.cube_area_start:.0f} px at the start, {report.cube_area_end:.0f} at the end"
        )
    print(f"written: {path}")
    return reports
