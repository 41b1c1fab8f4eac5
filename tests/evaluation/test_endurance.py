"""Long rollouts: the checks find the faults they are for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hma_gym.benchmarks.endurance import EnduranceConfig, endurance
from hma_gym.collection.collect import CollectConfig, collect
from hma_gym.data.robomimic_hdf5 import Dataset, open_dataset
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.endurance import (
    EnduranceReport,
    LongRollouts,
    ScriptedActor,
    background_psnr,
    blobs_of,
    loop_actions,
    measure_endurance,
    red_mask,
    static_pixels,
    true_rollouts,
)
from hma_gym.evaluation.open_loop import Generated

BACKGROUND = torch.full((16, 16, 3), 150, dtype=torch.uint8)
STATIC = torch.zeros(16, 16, dtype=torch.bool)
STATIC[:4] = True


def _rollouts(frames_BTHWC: Tensor, hand_x: float = 1.0) -> LongRollouts:
    count, steps = frames_BTHWC.shape[:2]
    agent_pos = torch.full((count, steps, 9), hand_x)
    generated = Generated(frames_BTHWC, agent_pos, torch.zeros(count, steps, 3))
    return LongRollouts(("random",) * count, frames_BTHWC[:, 0], generated, torch.zeros(count, steps, 7))


def _video(steps: int = 60, cubes: int = 1) -> Tensor:
    frames = BACKGROUND.expand(1, steps, -1, -1, -1).clone()
    for i in range(cubes):
        frames[:, :, 8:11, 2 + 6 * i : 5 + 6 * i] = torch.tensor([200, 20, 20], dtype=torch.uint8)
    return frames


@pytest.mark.parametrize("cubes", [0, 1, 2])
def test_cubes_are_counted(cubes: int) -> None:
    start = np.zeros((1, 3), dtype=np.float32)
    report = measure_endurance(
        _rollouts(_video(cubes=cubes)), background_HWC=BACKGROUND, static_HW=STATIC, object_start_B3=start
    )
    assert report.clear_frames == 12 and report.cube_counts[cubes] == 12
    assert report.cube_area_end == 9 * cubes
    near = measure_endurance(
        _rollouts(_video(cubes=cubes), hand_x=0.05), background_HWC=BACKGROUND, static_HW=STATIC, object_start_B3=start
    )
    assert near.clear_frames == 0


def test_a_cube_that_something_lies_over_has_not_vanished() -> None:
    def report(frames: Tensor, place_x: float = 0.0) -> EnduranceReport:
        rollouts = _rollouts(frames)
        rollouts.generated.targets_BTX[:, 30:, 0] = place_x
        start = np.zeros((1, 3), dtype=np.float32)
        return measure_endurance(rollouts, background_HWC=BACKGROUND, static_HW=STATIC, object_start_B3=start)

    vanished, hidden = _video(), _video()
    vanished[:, 30:] = BACKGROUND
    hidden[:, 30:, 8:11, 2:5] = 40
    assert (report(vanished).cube_counts, report(vanished).hidden) == ((6, 6, 0), 0)
    assert (report(hidden).cube_counts, report(hidden).hidden) == ((6, 6, 0), 6)
    assert report(hidden, place_x=0.1).hidden == 0  # it is somewhere else by now


def test_a_fading_background_shows() -> None:
    frames = _video()
    frames[:, :, :4] += 2
    steady = measure_endurance(
        _rollouts(frames), background_HWC=BACKGROUND, static_HW=STATIC, object_start_B3=np.zeros((1, 3), np.float32)
    )
    assert steady.background_drift_db == pytest.approx(0.0, abs=1e-5)
    frames[:, 35:, :4] += 6
    fading = measure_endurance(
        _rollouts(frames), background_HWC=BACKGROUND, static_HW=STATIC, object_start_B3=np.zeros((1, 3), np.float32)
    )
    assert fading.background_drift_db == pytest.approx(20 * np.log10(2 / 8), abs=1e-4)
    assert fading.bare_drift_db == fading.worst_bare_drift_db < -5  # pixels near the cube are left out
    covered = _video()
    covered[:, 40:, 0:3, 0:3] = 0  # something is drawn over it: the background itself is as it was
    moved = measure_endurance(
        _rollouts(covered), background_HWC=BACKGROUND, static_HW=STATIC, object_start_B3=np.zeros((1, 3), np.float32)
    )
    assert moved.background_drift_db < -20 and moved.bare_drift_db == 0.0
    specks = _video()
    specks[:, 35:, 0, 0] += 1  # one level in one pixel: no video shows it
    speckled = measure_endurance(
        _rollouts(specks), background_HWC=BACKGROUND, static_HW=STATIC, object_start_B3=np.zeros((1, 3), np.float32)
    )
    assert speckled.background_drift_db < -10 and speckled.bare_drift_db == 0.0
    with pytest.raises(InvalidArgument, match="more than 40 steps"):
        measure_endurance(
            _rollouts(frames[:, :40]),
            background_HWC=BACKGROUND,
            static_HW=STATIC,
            object_start_B3=np.zeros((1, 3), np.float32),
        )


def test_static_pixels_exclude_where_things_move() -> None:
    static = static_pixels(_video()[0], BACKGROUND)
    assert not static[8:11, 2:5].any() and int((~static).sum()) == 9
    assert torch.equal(background_psnr(BACKGROUND, BACKGROUND, static), torch.tensor(100.0))


def test_blobs() -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = True  # diagonal neighbours are one blob
    mask[6:8, 6:8] = True
    mask[0, 7] = True
    assert [len(blob) for blob in blobs_of(mask)] == [4, 3, 1]
    assert [len(blob) for blob in blobs_of(mask, min_pixels=3)] == [4, 3]
    assert blobs_of(np.zeros((4, 4), dtype=bool)) == []
    assert red_mask(np.array([[[200, 20, 20], [200, 180, 20]]], dtype=np.uint8), 40).tolist() == [[True, False]]


def test_actions_loop() -> None:
    actions = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert loop_actions(actions, 7)[:, 0].tolist() == [0, 2, 4, 0, 2, 4, 0]
    with pytest.raises(InvalidArgument, match="got 0"):
        loop_actions(actions[:0], 7)


def test_scripts_act_on_what_is_predicted_and_take_turns() -> None:
    """The hand is sent to where the cube is at the start, then to where it is predicted (unless an attempt keeps its
    first aim, as some do)."""
    hand = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.04, -0.04]]).repeat(16, 1)
    actor = ScriptedActor(np.tile(np.array([[0.0, 0.2, 0.82]], np.float32), (16, 1)), seed=0, cycle=10)
    elsewhere = torch.tensor([[0.0, -0.2, 0.82]]).repeat(16, 1)
    sideways = torch.stack([actor(step, hand, elsewhere)[:, 1] for step in range(10)])
    assert (sideways[0] > 0.2).all() and int((sideways[5:].mean(dim=0) < -0.3).sum()) >= 4
    script = actor.scripts[0]
    assert actor(10, hand, elsewhere).shape == (16, 7) and actor.scripts[0] is not script


def test_the_benchmark_leaves_its_files(soft_folder: Path, toy_dataset: Dataset, tmp_path: Path) -> None:
    config = EnduranceConfig(
        data=toy_dataset.path,
        checkpoint=str(soft_folder),
        rollouts=3,
        rows=8,
        steps=48,
        out=tmp_path,
        name="toy",
        progress=False,
    )
    reports = endurance(config)
    assert list(reports) == ["random", "scripted", "recorded"]
    assert all(report.rollouts == 1 and len(report.background_psnr_curve) == 48 for report in reports.values())
    assert json.loads((tmp_path / "endurance_toy.json").read_text())["reports"]["scripted"]["steps"] == 48
    assert (tmp_path / "endurance_toy.png").stat().st_size > 1000


@pytest.mark.gl
def test_ground_truth_under_recorded_actions_is_the_recording(tmp_path: Path) -> None:
    recording = CollectConfig(tmp_path / "one.hdf5", episodes=2, workers=1, seed=3, steps=6, image_size=16)
    dataset = open_dataset(collect(recording, progress=False))
    episodes = [dataset[0], dataset[1]]
    states = np.stack([episode.states_TS[0] for episode in episodes])
    actions = np.stack([episode.actions_TA for episode in episodes])
    true = true_rollouts("lift", states, actions, 16, progress=False)
    for b, episode in enumerate(episodes):
        np.testing.assert_array_equal(true.frames_BTHWC[b, :-1].numpy(), episode.images_THWC[1:])
        np.testing.assert_allclose(true.agent_pos_BTP[b, :-1].numpy(), episode.agent_pos_TP[1:], atol=1e-6)
        np.testing.assert_allclose(true.targets_BTX[b, :-1].numpy(), episode.obs["object"][1:, :3], atol=1e-6)


@pytest.mark.gl
def test_the_benchmark_measures_ground_truth_beside_the_model(lift_folder: Path, tmp_path: Path) -> None:
    recording = CollectConfig(tmp_path / "one.hdf5", episodes=3, workers=1, seed=3, steps=6)
    path = collect(recording, progress=False)
    reports = endurance(
        EnduranceConfig(
            data=path,
            checkpoint=str(lift_folder),
            rollouts=3,
            rows=6,
            steps=41,
            split=None,
            truth=True,
            out=tmp_path,
            progress=False,
        )
    )
    kinds = ("random", "scripted", "recorded")
    assert list(reports) == [name for kind in kinds for name in (kind, f"{kind}, ground truth")]
    for kind in kinds:  # nothing moves where nothing moved in ground truth
        assert min(reports[f"{kind}, ground truth"].background_psnr_curve) > 40.0
    assert reports["random, ground truth"].cube_counts[1] > 0  # and the cube is there
