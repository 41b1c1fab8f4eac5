"""Every registered learned id, with the checkpoint that it comes with: checks, determinism, spaces, info keys."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import hma_gym.envs.vector
from hma_gym.dynamics.checkpoint import shipped_checkpoints
from hma_gym.envs.spaces import agent_pos_space, observation_space
from hma_gym.envs.tasks import TASKS

LEARNED = {f"HMA-{task.id_stem}-v0": task for task in TASKS.values() if task.checkpoint is not None}
OBS_TYPES = ["pixels", "pixels_agent_pos"]


ALL = [*LEARNED, "HMA-v0"]


@pytest.fixture
def arguments(learned_id: str, toy_folder: Path) -> dict[str, Any]:
    """What must be given beside the id: a checkpoint for HMA-v0 (and for tasks whose own one is not shipped here)."""
    task = LEARNED.get(learned_id)
    return {} if task is not None and task.checkpoint in shipped_checkpoints() else {"checkpoint": toy_folder}


def test_every_learned_id_is_registered_with_both_entry_points() -> None:
    ids = {name for name in gymnasium.registry if name.startswith("HMA-")}
    assert ids == {*LEARNED, "HMA-v0"}
    for name in ids:
        assert gymnasium.spec(name).vector_entry_point == "hma_gym.envs.vector:HMAVectorEnv"


@pytest.mark.parametrize("learned_id", ALL)
@pytest.mark.parametrize("obs_type", OBS_TYPES)
def test_check_env(learned_id: str, arguments: dict[str, Any], obs_type: str) -> None:
    sb3 = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(learned_id, obs_type=obs_type, **arguments)
        check_env(env.unwrapped)
        sb3.check_env(env.unwrapped)


@pytest.mark.parametrize("learned_id", ALL)
def test_same_seed_same_episode(learned_id: str, arguments: dict[str, Any]) -> None:
    episodes = []
    for _ in range(2):
        env = gymnasium.make(learned_id, obs_type="pixels_agent_pos", **arguments)
        observation, info = env.reset(seed=11)
        env.action_space.seed(11)
        frames, infos = [observation["pixels"]], [info]
        for _ in range(6):
            observation, _, _, _, info = env.step(env.action_space.sample())
            frames.append(observation["pixels"])
            infos.append(info)
        episodes.append((np.stack(frames), infos))
    assert np.array_equal(episodes[0][0], episodes[1][0]) and episodes[0][1] == episodes[1][1]
    assert not np.array_equal(episodes[0][0][-1], episodes[0][0][0])


@pytest.mark.parametrize("learned_id", ALL)
def test_a_row_does_not_feel_its_neighbours(learned_id: str, arguments: dict[str, Any]) -> None:
    envs = gymnasium.make_vec(learned_id, num_envs=3, obs_type="pixels_agent_pos", **arguments)
    runs = []
    for neighbours in (1, 2):
        rng, mine = np.random.default_rng(neighbours), np.random.default_rng(0)
        envs.reset(seed=[0, 10 * neighbours, 20 * neighbours])
        for t in range(5):
            if t == 2 * neighbours:
                envs.reset(options={"reset_mask": np.array([False, True, neighbours == 2])})
            others = rng.uniform(-1, 1, (2, *envs.single_action_space.shape))
            observations, *_, infos = envs.step(np.concatenate((mine.uniform(-1, 1, (1, others.shape[1])), others)))
        runs.append((observations["pixels"], observations["agent_pos"], infos["success_probability"]))
    for a, b in zip(*runs, strict=True):
        assert np.array_equal(a[0], b[0]) and not np.array_equal(a[1], b[1])


@pytest.mark.parametrize("learned_id", ALL)
def test_the_native_vector_env_without_a_warning(learned_id: str, arguments: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gymnasium.make_vec(learned_id, num_envs=2, **arguments)
        assert isinstance(envs, hma_gym.envs.vector.HMAVectorEnv)
        envs.reset(seed=0)
        observations, _, _, _, infos = envs.step(envs.action_space.sample())
    assert observations in envs.observation_space
    judged = {"is_success", "_is_success", "success_probability", "_success_probability"}
    sure = {"uncertainty", "_uncertainty"} if envs.world.checkpoint.uncertainty is not None else set()
    assert set(infos) == judged | sure


@pytest.mark.parametrize("obs_type", OBS_TYPES)
@pytest.mark.parametrize("learned_id", LEARNED)
def test_spaces_rate_and_horizon_are_those_of_the_ground_truth(
    learned_id: str, arguments: dict[str, Any], obs_type: Any
) -> None:
    task = LEARNED[learned_id]
    env = gymnasium.make(learned_id, obs_type=obs_type, **arguments)
    size = env.unwrapped.world.image_size
    assert env.observation_space == observation_space(obs_type, size, agent_pos_space(task.agent_pos_dim))
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, (task.action_dim,), np.float32)
    assert env.metadata["render_fps"] == task.control_hz
    truth = gymnasium.spec(f"GroundTruth-{task.id_stem}-v0")
    assert gymnasium.spec(learned_id).max_episode_steps == truth.max_episode_steps == task.horizon


@pytest.mark.gl
@pytest.mark.parametrize("obs_type", OBS_TYPES)
@pytest.mark.parametrize("learned_id", LEARNED)
def test_what_a_policy_sees_is_the_same_in_the_ground_truth(
    learned_id: str, arguments: dict[str, Any], obs_type: Any
) -> None:
    learned = gymnasium.make(learned_id, obs_type=obs_type, **arguments)
    size = learned.unwrapped.world.image_size[0]
    truth = gymnasium.make(f"GroundTruth-{LEARNED[learned_id].id_stem}-v0", obs_type=obs_type, image_size=size)
    assert learned.observation_space == truth.observation_space and learned.action_space == truth.action_space
    assert learned.metadata == truth.metadata and learned.render_mode == truth.render_mode
    (_, a), (_, b) = learned.reset(seed=0), truth.reset(seed=0)
    own = {"uncertainty"} if learned.unwrapped.world.checkpoint.uncertainty is not None else set()
    assert {k: type(v) for k, v in a.items() if k not in own} == {k: type(v) for k, v in b.items()}
    action = np.zeros(learned.action_space.shape, np.float32)
    mine, theirs = learned.step(action), truth.step(action)
    assert [type(x) for x in mine] == [type(x) for x in theirs] and mine[4].keys() == theirs[4].keys() | own
    assert learned.render().shape == truth.render().shape
