"""Both worlds under the same hand, and the files that an episode becomes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hma_gym.data.robomimic_hdf5 import open_dataset
from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.envs.ground_truth import GroundTruthEnv
from hma_gym.envs.tasks import get_task
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import EnvironmentState
from hma_gym.web import driving
from hma_gym.web.driving import LearnedDrive, TrueDrive, plain_env_args, save_episode

RIGHT = np.array([0, 0.5, 0, 0, 0, 0, -1], dtype=np.float32)


def test_an_episode_has_an_end(toy: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driving, "MOST_STEPS", 3)
    drive = LearnedDrive(LearnedWorld(toy))
    drive.start({"start": 1}, seed=0)
    with pytest.raises(EnvironmentState, match="nothing to save"):
        save_episode(tmp_path, "x", drive.track, None, np.zeros((0, 7), np.float32), attrs={}, env_args={}, fps=20.0)
    for _ in range(3):
        drive.step(RIGHT)
    with pytest.raises(EnvironmentState, match="save it or restart"):
        drive.step(RIGHT)
    drive.close()


@pytest.mark.gl
def test_the_true_world_beside_the_learned_one(toy: Checkpoint, tmp_path: Path) -> None:
    task = get_task("lift")
    seeded = GroundTruthEnv(task.key, render_mode=None)
    seeded.reset(seed=5)
    state_S = seeded.simulation.flattened_state()
    seeded.close()
    learned, truth = LearnedDrive(LearnedWorld(toy)), TrueDrive(task, 40)
    learned.start({"start": 0}, seed=0)
    first = truth.start(state_S)
    for _ in range(6):
        learned.step(RIGHT)
        last = truth.step(RIGHT)
    assert last.agent_pos_P[1] - first.agent_pos_P[1] > 0.02, "+y is right, as the keys of the page have it"
    files = save_episode(
        tmp_path,
        "episode",
        learned.track,
        truth.track,
        np.stack([RIGHT] * 6),
        attrs={"policy": "human"},
        env_args=truth.env_args,
        fps=20.0,
    )
    assert [path.name for path in files] == ["episode.hdf5", "episode_truth.hdf5", "episode.mp4"]
    (mine,), (true,) = open_dataset(files[0]), open_dataset(files[1])
    assert len(mine) == len(true) == 6 and mine.states_TS.shape == (6, 0)
    assert np.array_equal(true.states_TS[0], state_S) and np.array_equal(true.images_THWC[0], first.frame_HWC)
    assert not true.rewards_T.any() and true.attrs["category"] == "other" and mine.attrs["world"] == "learned"
    assert plain_env_args(task)["env_name"] == truth.env_args["env_name"] == "Lift"
    learned.close()
    truth.close()
