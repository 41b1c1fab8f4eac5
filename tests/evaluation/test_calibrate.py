"""Calibrating a checkpoint: one command, and its environments say how sure they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import hma_gym  # noqa: F401
from hma_gym import cli
from hma_gym.data.robomimic_hdf5 import Dataset
from hma_gym.dynamics.checkpoint import load_checkpoint
from hma_gym.envs.sb3 import make_sb3_env
from hma_gym.errors import InvalidArgument
from hma_gym.evaluation.held_out import load_held_out
from hma_gym.policies.mpc import LearnedDynamics, imagine
from hma_gym.training.recipes.uncertainty import measured_auroc, roll_out


@pytest.fixture(scope="module")
def calibrated(soft_folder: Path, toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "tiny"
    shutil.copytree(soft_folder, folder)
    words = ["calibrate", "--checkpoint", str(folder), "--data", str(toy_dataset.path), "--split", "train"]
    assert cli.main([*words, "--episodes", "24", "--steps", "7", "--no-progress"]) == 0
    return folder


def make(folder: Path, **arguments: object) -> gym.vector.VectorEnv:
    return gym.make_vec("HMA-Lift-v0", num_envs=2, checkpoint=str(folder), max_episode_steps=6, **arguments)


def test_weights_stay_and_errors_are_those_of_the_frames(
    calibrated: Path, soft_folder: Path, toy_dataset: Dataset
) -> None:
    before, after = load_checkpoint(soft_folder), load_checkpoint(calibrated)
    for name, tensor in before.dynamics.state_dict().items():
        assert torch.equal(tensor, after.dynamics.state_dict()[name])
    assert (calibrated / "README.md").read_text() == (soft_folder / "README.md").read_text()
    truth = load_held_out(toy_dataset, split="train", episodes=3, rows=5)
    rollouts = roll_out(after, truth, batch=2, progress=False)
    assert rollouts.features_ETF.shape == (3, 4, 16) and rollouts.dreamt_ET[2].tolist() == [1, 2, 3, 4]
    tokens = after.tokenizer.encode(torch.from_numpy(truth.frames_BTHWC[2, :2]))
    state = after.dynamics.start(tokens[:1], torch.from_numpy(truth.agent_pos_BTP[2:, 0]), torch.tensor([2]))
    _, out = after.dynamics.step(state, torch.from_numpy(truth.actions_BTA[2:, 0]))
    torch.testing.assert_close(rollouts.error_ET[2, 0], (out.tokens[0] - tokens[1]).square().mean().sqrt())
    assert after.uncertainty is not None and 0 <= measured_auroc(after.uncertainty, rollouts) <= 1


def test_environments_say_how_sure_they_are(calibrated: Path, soft_folder: Path) -> None:
    envs = make(calibrated)
    _, infos = envs.reset(seed=0)
    assert infos["uncertainty"].tolist() == [0.0, 0.0]  # a real frame
    state, actions = envs.unwrapped.save_state(), np.ones((2, 7), np.float32)  # type: ignore[attr-defined]
    first = envs.step(actions)[4]["uncertainty"]
    assert ((first > 0) & (first < 1)).all()
    envs.step(-actions)
    envs.unwrapped.load_state(state)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(envs.step(actions)[4]["uncertainty"], first)
    assert "uncertainty" not in make(soft_folder).reset()[1]
    env = gym.make("HMA-Lift-v0", checkpoint=str(calibrated))
    env.reset(seed=0)
    assert env.step(actions[0])[4]["uncertainty"] == pytest.approx(first[0], abs=1e-5)


def test_episodes_end_where_the_model_is_lost(calibrated: Path) -> None:
    plain = make(calibrated)
    plain.reset(seed=3)
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 2, 7)).astype(np.float32)
    scores = np.stack([plain.step(action)[4]["uncertainty"] for action in actions])
    bound = float(np.sort(scores[:, 0])[-2:].mean())  # environment 0 passes it once
    ends = [int(np.argmax(scores[:, i] > bound)) if (scores[:, i] > bound).any() else 5 for i in range(2)]
    envs = make(calibrated, max_uncertainty=bound, autoreset_mode="Disabled")
    envs.reset(seed=3)
    over = np.zeros(2, bool)
    for step, action in enumerate(actions[: min(ends) + 1]):
        _, _, terminated, truncated, _ = envs.step(action)
        over |= truncated
        assert truncated.tolist() == [step == ends[0], step == ends[1]] and not terminated.any()
    assert over.any()
    envs.reset(seed=3)
    chunk = envs.unwrapped.step_chunk(actions.transpose(1, 0, 2))  # type: ignore[attr-defined]
    assert chunk.steps.tolist() == [end + 1 for end in ends] and chunk.truncations.all()
    env = gym.make("HMA-Lift-v0", checkpoint=str(calibrated), max_uncertainty=1e-6)
    env.reset(seed=0)
    assert env.step(actions[0, 0])[3] is True


def test_planning_and_learning_are_told(calibrated: Path, soft_folder: Path) -> None:
    dynamics = LearnedDynamics(load_checkpoint(calibrated))
    envs = make(calibrated, obs_type="pixels_agent_pos")
    observation, _ = envs.reset(seed=0)
    state = dynamics.resume(envs.unwrapped.save_state())  # type: ignore[attr-defined]
    futures = imagine(dynamics, dynamics.fork(state, 1), torch.ones(2, 3, 7))
    actions = np.ones((2, 7), np.float32)
    told = np.stack([envs.step(actions)[4]["uncertainty"] for _ in range(3)], axis=1)
    np.testing.assert_allclose(futures.uncertainty_BH, told, atol=1e-5)
    seen = dynamics.observe(state, actions, observation, np.array([False, False]))
    later = imagine(dynamics, dynamics.fork(seen, 1), torch.ones(2, 1, 7))
    assert (later.uncertainty_BH[:, 0] < futures.uncertainty_BH[:, 1]).any()  # counted from the last real frame
    learner = {}
    for weight in (0.0, 0.5):
        env = make_sb3_env(
            make(calibrated, autoreset_mode="SameStep").unwrapped,  # type: ignore[arg-type]
            uncertainty_weight=weight,
        )
        env.seed(0)
        env.reset()
        learner[weight] = env.step(actions)
    lost = np.array([info["uncertainty"] for info in learner[0.5][3]])
    np.testing.assert_allclose(learner[0.0][1] - learner[0.5][1], 0.5 * lost, atol=1e-6)
    with pytest.raises(InvalidArgument, match="needs a calibrated checkpoint"):
        make_sb3_env(make(soft_folder, autoreset_mode="SameStep").unwrapped, uncertainty_weight=0.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="max_uncertainty needs a calibrated checkpoint"):
        make(soft_folder, max_uncertainty=0.5)
    with pytest.raises(InvalidArgument, match=r"must lie in \(0, 1\)"):
        make(calibrated, max_uncertainty=1.5)
