"""The fidelity benchmark on toy worlds: figures that can be worked out by hand, and the files it leaves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hma_gym.benchmarks.fidelity import FidelityConfig, fidelity, scene_frames
from hma_gym.data.robomimic_hdf5 import Dataset, EpisodeWriter, open_dataset
from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.evaluation.fidelity import (
    FidelitySettings,
    compare_outcomes,
    measure_delta_psnr,
    measure_fidelity,
    rollout_seeds,
)
from hma_gym.evaluation.fidelity_report import judge_criteria, to_markdown
from hma_gym.evaluation.held_out import category_at_end, load_held_out
from hma_gym.evaluation.open_loop import generate, reconstruct
from hma_gym.metrics.video import PSNR_CAP, background_image, psnr

SETTINGS = FidelitySettings(steps=6, last_steps=2, random_sequences=2, batch=3, progress=False)


class HeightJudge:
    """Sees success where red is in the upper half: right by construction on the toy's real frames."""

    name, window, threshold = "height", 1, 0.5

    def probability(self, frames_BKHWC: Tensor) -> Tensor:
        upper = frames_BKHWC[:, -1, :8].float()
        return ((upper[..., 0] - upper[..., 1]).amax(dim=(-2, -1)) > 100).float()


def test_held_out_is_cut_drawn_and_categorised(toy_dataset: Dataset) -> None:
    held_out = load_held_out(toy_dataset, split="test", episodes=3, rows=8, seed=1)
    assert len(held_out) == 3 and held_out.rows == 8
    assert held_out.names == load_held_out(toy_dataset, split="test", episodes=3, rows=8, seed=1).names
    assert len(load_held_out(toy_dataset, split=None, episodes=99, rows=8)) == len(toy_dataset)
    whole = load_held_out(toy_dataset, split="train", episodes=99, rows=8)
    assert set(whole.categories) == {"held", "dropped", "near_miss", "pushed"}
    assert (whole.success_BT[:, -1] == (np.array(whole.categories) == "held")).all()
    with pytest.raises(DatasetError, match="ask for fewer steps"):
        load_held_out(toy_dataset, split="test", episodes=3, rows=9)
    with pytest.raises(InvalidArgument, match="rows=1"):
        load_held_out(toy_dataset, split="test", episodes=3, rows=1)


def test_stills_are_never_held_out(toy_dataset: Dataset, tmp_path: Path) -> None:
    writer = EpisodeWriter(tmp_path / "both.hdf5", env_args={}, info={})
    stills = dataclasses.replace(toy_dataset[1], attrs={"category": "still", "still": True})
    for episode in (stills, toy_dataset[0], stills):
        writer.append(episode)
    both = open_dataset(writer.merge())
    assert load_held_out(both, split=None, episodes=9, rows=8).names == ("demo_1",)
    assert load_held_out(both, split="train", episodes=9, rows=8).names == ("demo_1",)
    only = EpisodeWriter(tmp_path / "only.hdf5", env_args={}, info={})
    only.append(stills)
    with pytest.raises(DatasetError, match="the longest of the file has 0"):
        load_held_out(open_dataset(only.merge()), split=None, episodes=1, rows=8)


def test_the_category_follows_the_cut() -> None:
    up, down = np.array([False, True, True]), np.array([False, False, False])
    assert category_at_end(up, "dropped") == "held"
    assert category_at_end(np.array([False, True, False]), "switched") == "dropped"
    assert category_at_end(down, "near_miss") == "near_miss"
    assert category_at_end(down, "held") == "other"


def test_batching_changes_nothing(checkpoint: Checkpoint, toy_dataset: Dataset) -> None:
    held_out = load_held_out(toy_dataset, split="test", episodes=4, rows=8)
    inputs = (
        torch.from_numpy(held_out.frames_BTHWC[:, 0]),
        torch.from_numpy(held_out.agent_pos_BTP[:, 0]),
        torch.from_numpy(held_out.actions_BTA[:, :5]),
        rollout_seeds(4, 0),
    )
    whole, single = generate(checkpoint, *inputs, batch=4), generate(checkpoint, *inputs, batch=1)
    assert whole.frames_BTHWC.shape == (4, 5, 16, 16, 3) and whole.targets_BTX.shape == (4, 5, 3)
    assert torch.allclose(whole.agent_pos_BTP, single.agent_pos_BTP, atol=1e-5)
    assert (whole.frames_BTHWC.int() - single.frames_BTHWC.int()).abs().max() <= 1
    last = generate(checkpoint, *inputs, batch=4, last_only=True)
    assert torch.equal(last.frames_BTHWC[:, 0], whole.frames_BTHWC[:, -1])
    with pytest.raises(InvalidArgument, match="one row per episode"):
        generate(checkpoint, *inputs[:3], rollout_seeds(3, 0))


def test_the_report_agrees_with_its_parts(checkpoint: Checkpoint, toy_dataset: Dataset) -> None:
    held_out = load_held_out(toy_dataset, split="test", episodes=4, rows=8)
    background = background_image(scene_frames(toy_dataset))
    measured = measure_fidelity(checkpoint, held_out, SETTINGS, background_HWC=background, judge=HeightJudge())
    report = measured.report
    truth = torch.from_numpy(held_out.frames_BTHWC)
    by_hand = psnr(truth[:, 1:7], measured.generated.frames_BTHWC[:, :6])
    assert report.generated.psnr.value == pytest.approx(float(by_hand.mean()), abs=1e-4)
    assert report.generated.psnr_last.value == pytest.approx(float(by_hand[:, -2:].mean()), abs=1e-4)
    assert report.generated.psnr_curve == pytest.approx(by_hand.mean(dim=0).tolist(), abs=1e-4)
    ceiling = psnr(truth[:, 1:7], reconstruct(checkpoint, truth[:, 1:7]))
    assert report.ceiling.psnr.value == pytest.approx(float(ceiling.mean()), abs=1e-4)
    still = psnr(truth[:, 1:7], truth[:, :1].expand(-1, 6, -1, -1, -1))
    assert report.floor.psnr.value == pytest.approx(float(still.mean()), abs=1e-4)
    assert report.floor.psnr_curve[0] == PSNR_CAP  # nothing moves in the first step of the toy
    moved = measured.generated.agent_pos_BTP[:, 5, :3].numpy() - held_out.agent_pos_BTP[:, 6, :3]
    assert report.agent_pos_error_m is not None and report.outcomes_of_truth is not None and report.outcomes is not None
    assert report.agent_pos_error_m.value == pytest.approx(np.linalg.norm(moved, axis=-1).mean(), rel=1e-4)
    assert report.outcomes_of_truth.overall.agreement.value == 1.0
    assert len(report.misses) == report.episodes - report.outcomes.overall.agree
    assert report.delta_psnr is not None
    assert (report.perplexity is not None) == (checkpoint.tokenizer.kind == "vq")
    if report.perplexity is not None:  # untrained: the head's weights are zero, so all 12 codes are alike
        assert report.perplexity.value == pytest.approx(12.0, rel=1e-3)
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_delta_psnr_on_some_of_the_episodes(checkpoint: Checkpoint, toy_dataset: Dataset) -> None:
    held_out = load_held_out(toy_dataset, split="test", episodes=4, rows=8)
    settings = dataclasses.replace(SETTINGS, random_sequences=2)
    first = dataclasses.replace(settings, control_episodes=2)
    generated = generate(
        checkpoint,
        torch.from_numpy(held_out.frames_BTHWC[:, 0]),
        torch.from_numpy(held_out.agent_pos_BTP[:, 0]),
        torch.from_numpy(held_out.actions_BTA[:, :6]),
        rollout_seeds(4, 0),
    )
    whole = measure_delta_psnr(checkpoint, held_out, generated, settings)
    part = measure_delta_psnr(checkpoint, held_out, generated, first)
    assert np.isfinite([whole.value, part.value]).all()
    with pytest.raises(InvalidArgument, match="control_episodes"):
        FidelitySettings(control_episodes=0)


def test_cube_errors_come_from_a_judge_that_locates(checkpoint: Checkpoint, toy_dataset: Dataset) -> None:
    held_out = load_held_out(toy_dataset, split="test", episodes=2, rows=8)
    settings = dataclasses.replace(SETTINGS, random_sequences=0)
    background = background_image(scene_frames(toy_dataset))
    with_position = measure_fidelity(
        checkpoint, held_out, settings, background_HWC=background, judge=checkpoint.judge
    ).report
    assert with_position.cube_error_judge_m is not None and with_position.cube_error_judge_floor_m is not None
    assert len(with_position.cube_error_judge_curve_m) == 6
    bare = measure_fidelity(checkpoint, held_out, settings, background_HWC=background, judge=None).report
    assert bare.outcomes is None and bare.cube_error_judge_m is None and bare.delta_psnr is None
    assert "perplexity" in to_markdown(bare, {}, {})


class Feeling:
    """Told agent_pos, and remembers it; says that the object is where the hand was at the window's beginning."""

    name, window, threshold, state_dim = "feeling", 2, 0.5, 9

    def __init__(self) -> None:
        self.felt: list[Tensor] = []

    def probability(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None = None) -> Tensor:
        assert agent_pos_BKP is not None
        self.felt.append(agent_pos_BKP)
        return torch.ones(len(frames_BKHWC))

    def position(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None = None) -> Tensor:
        assert agent_pos_BKP is not None
        return agent_pos_BKP[:, 0, :3]


def test_judges_are_told_agent_pos_of_the_frames_they_see(checkpoint: Checkpoint, toy_dataset: Dataset) -> None:
    held_out = load_held_out(toy_dataset, split="test", episodes=2, rows=8)
    settings = dataclasses.replace(SETTINGS, random_sequences=0)
    background, judge = background_image(scene_frames(toy_dataset)), Feeling()
    measured = measure_fidelity(checkpoint, held_out, settings, background_HWC=background, judge=judge)
    real = torch.from_numpy(held_out.agent_pos_BTP)
    foretold = torch.cat([real[:, :1], measured.generated.agent_pos_BTP], dim=1)
    assert not torch.equal(foretold[:, -2:], real[:, -2:])
    assert torch.equal(judge.felt[0], foretold[:, -2:]) and torch.equal(judge.felt[1], real[:, -2:])
    report, truth = measured.report, held_out.object_BT3[:, 6]
    for said, felt in ((report.cube_error_judge_m, foretold), (report.cube_error_judge_floor_m, real)):
        assert said is not None
        assert said.value == pytest.approx(np.linalg.norm(felt[:, 5, :3].numpy() - truth, axis=-1).mean(), rel=1e-4)


def test_outcomes_by_hand() -> None:
    true = np.array([True, True, False, False, False])
    seen = np.array([True, False, True, True, False])
    outcomes = compare_outcomes(true, seen, ["held", "held", "dropped", "near_miss", "near_miss"])
    assert (outcomes.overall.agree, outcomes.overall.false_positives, outcomes.overall.false_negatives) == (2, 2, 1)
    assert outcomes.by_category["near_miss"].agreement.value == 0.5
    assert outcomes.rate_gap.value == pytest.approx(0.2)
    assert (outcomes.true_rate, outcomes.seen_rate) == (0.4, 0.6)


def test_too_few_rows_are_refused(checkpoint: Checkpoint, toy_dataset: Dataset) -> None:
    held_out = load_held_out(toy_dataset, split="test", episodes=2, rows=4)
    with pytest.raises(InvalidArgument, match="at least 7 rows, got 4"):
        measure_fidelity(
            checkpoint,
            held_out,
            SETTINGS,
            background_HWC=background_image(scene_frames(toy_dataset)),
            judge=HeightJudge(),
        )


def test_the_benchmark_leaves_its_files(soft_folder: Path, toy_dataset: Dataset, tmp_path: Path) -> None:
    config = FidelityConfig(
        data=toy_dataset.path,
        checkpoint=str(soft_folder),
        episodes=4,
        rows=8,
        steps=6,
        random_sequences=1,
        out=tmp_path,
        name="toy",
        progress=False,
    )
    measured = fidelity(config)
    content = json.loads((tmp_path / "fidelity_toy.json").read_text())
    assert content["report"]["generated"]["psnr"]["value"] == pytest.approx(measured.report.generated.psnr.value)
    assert {"commit", "processor", "packages", "torch_threads"} <= set(content["provenance"])
    assert content["config"]["seed"] == 0
    assert str(tmp_path) not in json.dumps(content), "results name no place on this machine"
    assert not all(c.passed for c in judge_criteria(measured.report))
    page = (tmp_path / "fidelity_toy.md").read_text()
    assert "| outcome agreement 90 % or more |" in page
    sheets = sorted((tmp_path / "fidelity_toy_strips").glob("*.png"))
    assert sheets
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 200
