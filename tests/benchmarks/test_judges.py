"""The comparison of judges: its figures are what the judges themselves say, frame by frame."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_checkpoint import ACTION_DIM, SIZE, STATE_DIM, told_checkpoint, toy_checkpoint

from hma_gym.benchmarks.judges import JudgesConfig, judges, on_real
from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter
from hma_gym.dynamics.checkpoint import Checkpoint, save_checkpoint
from hma_gym.errors import CheckpointError
from hma_gym.judges.feature import FeatureConfig, FeatureJudge, save_feature_judge
from hma_gym.judges.protocol import episode_probabilities

EPISODES, ROWS = 3, 5


def _episode(seed: int) -> Episode:
    generator = np.random.default_rng(seed)
    return Episode(
        images_THWC=generator.integers(0, 256, (ROWS, SIZE, SIZE, 3), dtype=np.uint8),
        agent_pos_TP=generator.normal(0, 0.1, (ROWS, STATE_DIM)).astype(np.float32),
        actions_TA=generator.uniform(-1, 1, (ROWS, ACTION_DIM)).astype(np.float32),
        states_TS=np.zeros((ROWS, 2)),
        rewards_T=(generator.random(ROWS) < 0.5).astype(np.float32),
        dones_T=np.zeros(ROWS, bool),
        attrs={"category": "pushed"},
    )


@pytest.fixture
def config(tmp_path: Path) -> JudgesConfig:
    writer = EpisodeWriter(tmp_path / "data.hdf5", env_args={"env_name": "Toy", "type": 1, "env_kwargs": {}}, info={})
    for seed in range(EPISODES):
        writer.append(_episode(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        feature = FeatureJudge(FeatureConfig(window=3, tokens=25, channels=4, hidden=16, width=8))
    return JudgesConfig(
        data=writer.merge(),
        checkpoint=str(save_checkpoint(toy_checkpoint(), tmp_path / "checkpoint")),
        feature_judge=save_feature_judge(feature, tmp_path / "judge"),
        **{"rollouts": 2, "rows": ROWS, "split": None, "batch": 2, "out": tmp_path / "out", "progress": False},
    )


def test_both_judges_are_measured_and_compared(config: JudgesConfig) -> None:
    data, page = judges(config)
    content = json.loads(data.read_text())
    assert [report["judge"] for report in content["reports"]] == ["toy", "feature"]
    for report in content["reports"]:
        counts = [report[part]["count"] for part in ("frames", "outcomes", "generated_outcomes")]
        assert counts == [EPISODES * ROWS, EPISODES, 2]
    assert sum(content["confusion"].values()) == 2
    same = content["confusion"]["toy True, feature True"] + content["confusion"]["toy False, feature False"]
    assert content["agreement"]["outcomes"]["value"] == same / 2
    assert "the two agree in" in page.read_text()


@pytest.mark.parametrize("made", [toy_checkpoint, told_checkpoint])
def test_reading_each_frame_once_says_the_same(made: Callable[[], Checkpoint]) -> None:
    checkpoint = made()
    feature = FeatureJudge(FeatureConfig(window=3, tokens=25, channels=4, hidden=16, width=8)).eval()
    frames = torch.from_numpy(np.stack([_episode(seed).images_THWC for seed in range(2)]))
    agent_pos = torch.from_numpy(np.stack([_episode(seed).agent_pos_TP for seed in range(2)]))
    said = on_real(dataclasses.replace(checkpoint, feature_judge=feature), frames, agent_pos, progress=False)
    assert checkpoint.judge is not None
    expected = episode_probabilities(checkpoint.judge, frames, agent_pos_BTP=agent_pos)
    assert np.allclose(said["toy"], expected.numpy(), atol=1e-5)


def test_a_missing_judge_is_named(config: JudgesConfig) -> None:
    with pytest.raises(CheckpointError, match="must have a classifier and a feature judge"):
        judges(dataclasses.replace(config, feature_judge=None))
