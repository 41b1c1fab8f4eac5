"""The learned environments under stable-baselines3: its check, its wrappers, its callbacks, PPO and SAC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import hma_gym  # noqa: F401
from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.envs.sb3 import make_sb3_env
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import EnvironmentState, InvalidArgument
from hma_gym.judges.protocol import Judge

pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO, SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize, VecTransposeImage


def make(toy: Checkpoint, count: int = 2, steps: int = 3, terminate: bool = False, **arguments: Any) -> Any:
    envs = HMAVectorEnv(
        count,
        checkpoint=toy,
        obs_type="pixels_agent_pos",
        max_episode_steps=steps,
        autoreset_mode="SameStep",
        terminate_on_success=terminate,
    )
    return make_sb3_env(envs, **arguments)


def actions(rng: np.random.Generator, count: int = 2) -> np.ndarray:
    return rng.uniform(-1, 1, (count, 7)).astype(np.float32)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # advice of SB3's check about spaces, which are the tasks' own
@pytest.mark.parametrize("obs_type", ["pixels", "pixels_agent_pos"])
def test_the_single_environment_passes_sb3s_check(toy_folder: Path, obs_type: str) -> None:
    env = gym.make("HMA-Lift-v0", checkpoint=str(toy_folder), obs_type=obs_type, max_episode_steps=5)
    check_env(env.unwrapped, warn=True)


def test_episodes_end_as_sb3_wants_them(toy: Checkpoint) -> None:
    env, rng = make(toy), np.random.default_rng(0)
    plain = HMAVectorEnv(2, checkpoint=toy, obs_type="pixels_agent_pos")
    env.seed(7)
    first = env.reset()
    same, infos = plain.reset(seed=7)
    np.testing.assert_array_equal(first["pixels"], same["pixels"])
    assert env.reset_infos[1]["success_probability"] == infos["success_probability"][1]
    for step in range(1, 4):
        chosen = actions(rng)
        observation, rewards, dones, infos = env.step(chosen)
        truth = plain.step(chosen)
        assert rewards.dtype == np.float32 and (dones == (step == 3)).all() and isinstance(infos, list)
        np.testing.assert_array_equal(rewards, truth[1].astype(np.float32))
        for i in range(2):
            assert infos[i]["success_probability"] == truth[4]["success_probability"][i]
            assert infos[i]["is_success"] == bool(truth[4]["is_success"][i])
    for i in range(2):
        np.testing.assert_array_equal(infos[i]["terminal_observation"]["pixels"], truth[0]["pixels"][i])
        assert infos[i]["TimeLimit.truncated"] is True
        assert not np.array_equal(observation["pixels"][i], truth[0]["pixels"][i])  # a new episode has begun
        assert env.reset_infos[i]["success_probability"] != infos[i]["success_probability"]
    env.set_options({"start": 2})
    chosen_start = env.reset()
    np.testing.assert_array_equal(chosen_start["pixels"][1], toy.starts.frames_NHWC[2])
    again = env.reset()  # options and seeds act once
    assert not np.array_equal(again["pixels"], chosen_start["pixels"])


class Sequence(Judge):
    """Given probabilities, one a call."""

    name, window, threshold = "sequence", 1, 0.5

    def __init__(self, *values: float) -> None:
        self._values = list(values)

    def probability(self, frames_BKHWC: Any) -> Any:
        import torch

        return torch.full((len(frames_BKHWC),), self._values.pop(0))


@pytest.mark.parametrize("terminate", [False, True])
def test_shaping_is_the_discounted_difference_of_the_potential(toy: Checkpoint, terminate: bool) -> None:
    # First frame, two steps (the second ends the episode), the first frame of the next episode, one step of it.
    judge = Sequence(0.1, 0.3, 0.9, 0.2, 0.25)
    envs = HMAVectorEnv(
        1,
        checkpoint=toy,
        judge=judge,
        max_episode_steps=2,
        autoreset_mode="SameStep",
        terminate_on_success=terminate,
    )
    env, rng = make_sb3_env(envs, shaping=2.0, gamma=0.5), np.random.default_rng(0)
    env.reset()
    rewards = []
    for _ in range(3):
        _, reward, done, infos = env.step(actions(rng, 1))
        rewards.append(float(reward[0]))
        if done[0]:
            assert infos[0]["TimeLimit.truncated"] is not terminate
            assert infos[0]["is_success"] is True
    potential_at_end = 0.0 if terminate else 0.9  # after a true end nothing follows
    expected = [2 * (0.5 * 0.3 - 0.1), 1 + 2 * (0.5 * potential_at_end - 0.3), 2 * (0.5 * 0.25 - 0.2)]
    np.testing.assert_allclose(rewards, expected, atol=1e-6)


def test_ppo_learns_under_monitor_normalisation_and_evaluation(toy: Checkpoint, tmp_path: Path) -> None:
    env = VecTransposeImage(VecNormalize(VecMonitor(make(toy, shaping=1.0)), norm_obs_keys=["agent_pos"]))
    judge = EvalCallback(
        VecTransposeImage(VecNormalize(VecMonitor(make(toy)), norm_obs_keys=["agent_pos"], training=False)),
        n_eval_episodes=2,
        eval_freq=4,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    arguments: dict[str, Any] = {"n_steps": 4, "batch_size": 4, "n_epochs": 1, "seed": 0, "device": "cpu"}
    model = PPO("MultiInputPolicy", env, policy_kwargs={"net_arch": [8]}, **arguments)
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(16, callback=judge)
    assert model.num_timesteps == 16 and len(model.ep_info_buffer) == 4
    assert any((a != b).any() for a, b in zip(before, model.policy.parameters(), strict=True))
    results = np.load(tmp_path / "evaluations.npz")
    assert results["ep_lengths"].shape == (2, 2) and (results["ep_lengths"] == 3).all()
    assert results["successes"].shape == (2, 2)  # SB3 has found info["is_success"]
    assert (tmp_path / "best_model.zip").exists()


def test_sac_learns(toy: Checkpoint) -> None:
    env = make(toy)
    model = SAC(
        "MultiInputPolicy",
        env,
        buffer_size=32,
        learning_starts=4,
        batch_size=4,
        policy_kwargs={"net_arch": [8]},
        seed=0,
        device="cpu",
    )
    before = [p.clone() for p in model.actor.parameters()]
    model.learn(10)
    assert model.num_timesteps == 10
    assert any((a != b).any() for a, b in zip(before, model.actor.parameters(), strict=True))
    # A cut episode is no end: what is learned from its last step still looks ahead, into the frame it ended with.
    assert model.replay_buffer.timeouts.any() and not (model.replay_buffer.dones > model.replay_buffer.timeouts).any()


def test_what_sb3_cannot_have_is_said(toy: Checkpoint) -> None:
    with pytest.raises(InvalidArgument, match="autoreset_mode='SameStep' and output='numpy'"):
        make_sb3_env(HMAVectorEnv(1, checkpoint=toy))
    with pytest.raises(InvalidArgument, match="must be at least 0"):
        make(toy, shaping=-1.0)
    env = make(toy)
    with pytest.raises(EnvironmentState, match="step_async"):
        env.step_wait()
    with pytest.raises(InvalidArgument, match="cannot act on one environment"):
        env.set_attr("render_mode", None)
    assert env.get_attr("num_envs", [0]) == [2] and env.env_is_wrapped(gym.Wrapper) == [False, False]
    assert env.has_attr("world") and not env.has_attr("worlds")
