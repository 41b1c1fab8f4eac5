"""HMAEnv: Gymnasium's and stable-baselines3's checks, states, and errors."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from same import assert_same
from toy_checkpoint import ACTION_DIM, SIZE

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.envs.single import HMAEnv
from hma_gym.envs.spaces import AGENT_POS_BOUND
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import EnvironmentState, InvalidAction, InvalidImage

OBS_TYPES = ["pixels", "pixels_agent_pos"]


@pytest.fixture(scope="module")
def world(toy: Checkpoint) -> LearnedWorld:
    return LearnedWorld(toy)


def actions(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, ACTION_DIM)).astype(np.float32)


def run(env: gymnasium.Env[Any, Any], count: int, seed: int = 3) -> tuple[Any, ...]:
    return tuple(env.step(a) for a in actions(seed, count))


@pytest.mark.parametrize("obs_type", OBS_TYPES)
def test_the_checkers_of_gymnasium_and_sb3_have_nothing_to_say(toy_folder: Path, obs_type: Any) -> None:
    sb3 = pytest.importorskip("stable_baselines3.common.env_checker")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("HMA-Lift-v0", checkpoint=toy_folder, obs_type=obs_type)
        check_env(env.unwrapped)
        sb3.check_env(env.unwrapped)
        env.close()


@pytest.mark.parametrize("obs_type", OBS_TYPES)
def test_it_is_row_0_of_a_vector_env(world: LearnedWorld, obs_type: Any) -> None:
    env, envs = HMAEnv(checkpoint=world, obs_type=obs_type), HMAVectorEnv(1, checkpoint=world, obs_type=obs_type)
    observation, info = env.reset(seed=4)
    observations, infos = envs.reset(seed=4)
    assert observation in env.observation_space and env.observation_space == envs.single_observation_space
    for a in actions(0, 6):
        row = {k: v[0] for k, v in observations.items()} if isinstance(observations, dict) else observations[0]
        assert_same(observation, row, tolerance=0)
        assert info == {key: infos[key][0] for key in info} and list(info) == ["is_success", "success_probability"]
        assert type(info["is_success"]) is bool and type(info["success_probability"]) is float
        observation, reward, terminated, truncated, info = env.step(a)
        observations, rewards, _, _, infos = envs.step(a[None])
        assert reward == rewards[0] == float(info["is_success"]) and not terminated and not truncated


def test_make_counts_the_horizon_and_success_may_terminate(toy_folder: Path) -> None:
    env = gymnasium.make("HMA-Lift-v0", checkpoint=toy_folder)
    env.reset(seed=0)
    horizon = gymnasium.spec("HMA-Lift-v0").max_episode_steps
    assert [env.step(a)[3] for a in actions(0, horizon)] == [False] * (horizon - 1) + [True]
    env = HMAEnv(checkpoint=toy_folder, terminate_on_success=True)
    env.reset(seed=0)
    for a in actions(0, 50):
        _, reward, terminated, _, info = env.step(a)
        assert terminated == info["is_success"] == bool(reward)
        if terminated:
            break
    with pytest.raises(EnvironmentState, match="over"):
        env.step(a)
    env.reset()
    env.step(a)


def test_predicted_agent_pos_stays_in_its_space(world: LearnedWorld) -> None:
    env = HMAEnv(checkpoint=world, obs_type="pixels_agent_pos")
    image = world.checkpoint.starts.frames_NHWC[0]
    observation, _ = env.reset(options={"image": image, "agent_pos": np.full(9, 5.0)})
    assert observation in env.observation_space and (observation["agent_pos"] == AGENT_POS_BOUND).all()
    assert env.step(actions(0, 1)[0])[0] in env.observation_space


def test_a_restored_state_goes_on_the_same_way(world: LearnedWorld) -> None:
    env = HMAEnv(checkpoint=world, obs_type="pixels_agent_pos")
    env.reset(seed=0)
    run(env, 3)
    state = env.get_state()
    expected = (run(env, 4), env.reset(), run(env, 4))
    env.reset(seed=77)
    env.set_state(state)
    assert_same((run(env, 4), env.reset(), run(env, 4)), expected, tolerance=0)
    other = HMAEnv(checkpoint=world, obs_type="pixels_agent_pos")
    other.set_state(pickle.loads(pickle.dumps(state)))
    assert_same((run(other, 4), other.reset(), run(other, 4)), expected, tolerance=0)
    with pytest.raises(EnvironmentState, match="save_state"):
        other.set_state({})


def test_its_generator_is_gymnasiums(world: LearnedWorld) -> None:
    env = HMAEnv(checkpoint=world)
    env.reset(seed=5)
    assert env.np_random_seed == 5
    env.np_random = np.random.default_rng(8)
    first = env.reset()[0]
    env.np_random = np.random.default_rng(8)
    assert np.array_equal(env.reset()[0], first)


def test_render(world: LearnedWorld) -> None:
    env = HMAEnv(checkpoint=world)
    env.reset(seed=0)
    assert env.render().shape == (256, 256, 3) and env.render().dtype == np.uint8
    silent = HMAEnv(checkpoint=world, render_mode=None)
    silent.reset(seed=0)
    assert silent.render() is None and silent.render_mode is None


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (np.zeros(ACTION_DIM - 1, np.float32), r"shape \(7,\), got \(6,\)"),
        (np.zeros((1, ACTION_DIM), np.float32), r"shape \(7,\), got \(1, 7\)"),
        (np.zeros(ACTION_DIM, np.int32), "floating dtype, got int32"),
        (np.array([0, 0, np.nan, 0, 0, 0, 0]), r"got nan at index \(2,\)"),
        (np.array([0, 0, 0, 0, 0, 0, -np.inf]), r"got -inf at index \(6,\)"),
        ("up", "floating dtype"),
    ],
)
def test_wrong_actions_are_refused(world: LearnedWorld, wrong: Any, text: str) -> None:
    env = HMAEnv(checkpoint=world)
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match=text):
        env.step(wrong)


def test_wrong_images_are_refused(world: LearnedWorld) -> None:
    env = HMAEnv(checkpoint=world)
    with pytest.raises(InvalidImage, match=r"got \(64, 64, 3\)"):
        env.reset(options={"image": np.zeros((64, 64, 3), np.uint8)})
    with pytest.raises(InvalidImage, match="float32"):
        env.reset(options={"image": np.zeros((SIZE, SIZE, 3), np.float32)})


def test_the_order_of_calls_is_checked(world: LearnedWorld) -> None:
    env = HMAEnv(checkpoint=world)
    for call in (lambda: env.step(np.zeros(7)), env.render, env.get_state):
        with pytest.raises(EnvironmentState, match=r"call reset\(\)"):
            call()
    env.reset(seed=0)
    state = env.get_state()
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(np.zeros(7)), env.render, env.get_state, lambda: env.set_state(state)):
        with pytest.raises(EnvironmentState, match="closed"):
            call()


def test_many_share_one_world(world: LearnedWorld) -> None:
    """Many in one process through Gymnasium's own vectoriser, and the weights are there once."""
    envs = gymnasium.vector.SyncVectorEnv([lambda: HMAEnv(checkpoint=world)] * 2)
    assert len({id(env.unwrapped.world) for env in envs.envs}) == 1
    envs.reset(seed=0)
    envs.step(envs.action_space.sample())
