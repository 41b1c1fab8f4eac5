"""A newcomer's way: robomimic-format files of two different robots in, one command, one checkpoint that steps."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest

from hma_gym import cli
from hma_gym.data.episodes import EEF_POS, Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter
from hma_gym.dynamics.checkpoint import load_checkpoint
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import DatasetError
from hma_gym.training.recipes.world import WorldOptions, image_size, train_world

ROWS = 24


def record(
    path: Path, action_dim: int, state_dim: int, size: int = 32, handles: bool = False, blind: bool = False
) -> Path:
    """Twelve episodes of a bright square that the first two actions move; rewarded in the right half.

    Where it ``handles`` a thing, agent_pos is a hand's, and robosuite's observation tells of the thing. A
    ``blind`` file has no images.
    """
    writer = EpisodeWriter(path, env_args={"env_name": "Own", "type": 1, "env_kwargs": {}}, info={})
    for index in range(12):
        rng = np.random.default_rng((index, action_dim))
        actions_TA = rng.uniform(-1, 1, (ROWS, action_dim)).astype(np.float32)
        place_T2 = np.clip(size / 2 + 2 * np.cumsum(actions_TA[:, :2], axis=0), 3, size - 4)
        images_THWC = np.full((ROWS, size, size, 3), 40 + 10 * state_dim, np.uint8)
        for image_HWC, (x, y) in zip(images_THWC, place_T2.astype(int), strict=True):
            image_HWC[y - 3 : y + 3, x - 3 : x + 3] = (230, 40, 40)
        agent_pos_TP = np.zeros((ROWS, state_dim), np.float32)
        agent_pos_TP[:, : min(2, state_dim)] = (place_T2 / size)[:, : min(2, state_dim)]
        obs: dict[str, np.ndarray] = {}
        if handles:
            agent_pos_TP[:, 6] = 1.0
            turned = np.array([0.0, 0.0, np.sin(index / 2), np.cos(index / 2)])
            thing = np.concatenate(
                (agent_pos_TP[:, :3] - 0.01, np.tile(turned, (ROWS, 1)), np.zeros((ROWS, 3))), axis=1
            )
            obs = {"object": thing, EEF_POS: agent_pos_TP[:, :3]}
        if blind:
            images_THWC = np.zeros((ROWS, 0, 0, 3), np.uint8)
        rewards_T = (place_T2[:, 0] > size / 2).astype(np.float32)
        writer.write(
            index,
            Episode(
                images_THWC=images_THWC,
                agent_pos_TP=agent_pos_TP,
                actions_TA=actions_TA,
                states_TS=np.zeros((ROWS, 0)),
                rewards_T=rewards_T,
                dones_T=np.arange(ROWS) == ROWS - 1,
                obs=obs,
                attrs={"success": bool(rewards_T[-1]), "seed": index},
            ),
        )
    return writer.merge()


@pytest.fixture(scope="module")
def two_robots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return record(folder / "small.hdf5", 2, 2), record(folder / "large.hdf5", 14, 9)


def test_two_robots_in_one_world(two_robots: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "world", "--data", *map(str, two_robots), "--out", str(out), "--size", "toy", "--steps", "2"]
    assert cli.main(words) == 0
    for name, action_dim, state_dim in (("small", 2, 2), ("large", 14, 9)):
        env = gymnasium.make(
            "HMA-v0",
            checkpoint=out / "checkpoint",
            domain=name,
            obs_type="pixels_agent_pos",
            max_episode_steps=3,
        )
        assert env.action_space.shape == (action_dim,)
        observation, info = env.reset(seed=0)
        assert observation["pixels"].shape == (32, 32, 3) and observation["agent_pos"].shape == (state_dim,)
        for _ in range(3):
            observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert env.observation_space.contains(observation) and "is_success" in info
        assert truncated
        env.close()


def test_a_robot_that_handles_a_thing(tmp_path: Path) -> None:
    """Data with an object's pose gives a world that knows where the object is, with no option set."""
    out = tmp_path / "run"
    data = record(tmp_path / "arm.hdf5", 4, 9, handles=True)
    assert train_world(WorldOptions((data,), out, size="toy", steps=2, judge="no")) == out / "checkpoint"
    checkpoint = load_checkpoint(out / "checkpoint")
    assert (checkpoint.domain.object_turns, checkpoint.domain.target_dim) == (1, 9)
    assert checkpoint.dynamics.adapter(0).body.sight is not None
    env = gymnasium.make("HMA-v0", checkpoint=out / "checkpoint", max_episode_steps=3)
    env.reset(seed=0)
    for _ in range(3):
        observation, _, _, truncated, _ = env.step(env.action_space.sample())
        assert env.observation_space.contains(observation)
    assert truncated
    env.close()
    envs = HMAVectorEnv(2, checkpoint=out / "checkpoint")
    envs.reset(seed=0)
    envs.action_space.seed(0)
    envs.step(envs.action_space.sample())
    saved, action = envs.save_state(), envs.action_space.sample()
    assert saved["tensors"]["rollout.targets_BO"].shape == (2, 9)
    assert saved["tensors"]["rollout.targets_BO"].any()
    first, *_ = envs.step(action)
    envs.load_state(saved)
    again, *_ = envs.step(action)
    assert np.array_equal(first, again)
    envs.close()


def test_files_without_images_are_taken_along(tmp_path: Path) -> None:
    blind = record(tmp_path / "blind.hdf5", 4, 9, handles=True, blind=True)
    seen = record(tmp_path / "seen.hdf5", 4, 9, handles=True)
    options = WorldOptions((blind, seen), tmp_path / "run", names=("arm", "arm"), size="toy", steps=2)
    checkpoint = load_checkpoint(train_world(options))
    assert checkpoint.provenance["episodes"] == [24] and checkpoint.judge is not None
    with pytest.raises(DatasetError, match="data must have one file with images"):
        train_world(WorldOptions((blind,), tmp_path / "other"))


def test_files_must_agree_on_the_size_of_images(two_robots: tuple[Path, Path], tmp_path: Path) -> None:
    other = record(tmp_path / "other.hdf5", 2, 2, size=40)
    with pytest.raises(DatasetError, match="one size, got: .*32 x 32.*40 x 40"):
        train_world(WorldOptions(data=(two_robots[0], other), out=tmp_path))
    assert image_size(two_robots) == (32, 32)
