"""The demonstration runs end to end on an untrained checkpoint and leaves one page and its videos."""

from __future__ import annotations

import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import hma_gym  # noqa: F401  (registers the ids)
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.demo import SCENES, DemoConfig, demo, record_truth, replay

pytestmark = pytest.mark.gl


def test_the_demo_leaves_one_page_and_its_videos(
    lift_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = demo(DemoConfig(out=tmp_path / "demo", checkpoint=str(lift_folder), steps=5, scenes=2))
    page = report.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4 and all(source.startswith("data:") for source in sources)
    assert page.count("<h2>") == 3 and SCENES[0].title in page and "tiny-lift" in page
    assert str(tmp_path) not in page
    assert sorted(path.name for path in report.parent.glob("*.mp4")) == ["scene_1.mp4", "scene_2.mp4"]
    assert str(report.resolve()) in capsys.readouterr().out


def test_both_worlds_begin_at_the_same_frame_and_take_the_same_actions(lift_folder: Path) -> None:
    truth_env = gymnasium.make(
        "GroundTruth-Lift-v0", obs_type="pixels_agent_pos", privileged_info=True, starts=str(lift_folder)
    )
    learned_env = gymnasium.make("HMA-Lift-v0", obs_type="pixels_agent_pos", checkpoint=str(lift_folder))
    truth = record_truth(truth_env, SCENES[0], 1, 3, seed=0)
    learned = replay(learned_env, 1, truth.actions_TA, seed=0)
    again = record_truth(truth_env, SCENES[0], 1, 3, seed=0)
    random = record_truth(truth_env, SCENES[4], 1, 3, seed=0)
    truth_env.close()
    learned_env.close()
    assert truth.frames_THWC.shape == learned.frames_THWC.shape == (4, 64, 64, 3)
    # MuJoCo renders a state set anew within a grey level or two of the recording.
    assert np.abs(truth.frames_THWC[0].astype(int) - learned.frames_THWC[0]).mean() < 1.0
    assert np.array_equal(truth.actions_TA, again.actions_TA)
    assert not np.array_equal(truth.actions_TA, random.actions_TA)


def test_impossible_demos_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="scenes=0"):
        DemoConfig(scenes=0)
