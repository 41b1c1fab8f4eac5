"""Reinforcement learning in a toy world: cloning, learning, evaluation, going on; the models are policies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_checkpoint import ACTION_DIM, SIZE, STATE_DIM
from toy_policies import observations

from hma_gym import cli
from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter
from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.steppers import Sketch
from hma_gym.envs.sb3 import make_sb3_env
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import DatasetError, InvalidArgument, ResumeError
from hma_gym.learning import rl
from hma_gym.learning.rl import RLOptions, Score, clone_policy, make_model, train_rl
from hma_gym.policies.loading import EpisodeSeed, load_policy
from hma_gym.policies.sb3 import load_sb3

pytest.importorskip("stable_baselines3")

ROWS = 6


def record(path: Path, size: int = SIZE) -> Path:
    """Demonstrations whose action is told by where the hand is."""
    writer = EpisodeWriter(path, env_args={"env_name": "Toy", "type": 1, "env_kwargs": {}}, info={})
    for index in range(6):
        rng = np.random.default_rng(index)
        pose = rng.uniform(-0.5, 0.5, (ROWS, STATE_DIM)).astype(np.float32)
        writer.write(
            index,
            Episode(
                images_THWC=rng.integers(0, 256, (ROWS, size, size, 3), dtype=np.uint8),
                agent_pos_TP=pose,
                actions_TA=np.tile(np.sign(pose[:, :1]) * 0.8, (1, ACTION_DIM)).astype(np.float32),
                states_TS=np.zeros((ROWS, 0)),
                rewards_T=np.zeros(ROWS, np.float32),
                dones_T=np.arange(ROWS) == ROWS - 1,
                attrs={"success": False, "seed": index},
            ),
        )
    return writer.merge()


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("rl") / "demos.hdf5")


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_cloning_teaches_the_demonstrated_actions(
    toy: Checkpoint, demonstrations: Path, tmp_path: Path, algorithm: Any
) -> None:
    options = RLOptions(out=tmp_path, algorithm=algorithm, num_envs=1, rollout=4, buffer=8)
    envs = HMAVectorEnv(1, checkpoint=toy, obs_type="pixels_agent_pos", autoreset_mode="SameStep")
    model = make_model(options, make_sb3_env(envs), toy)

    def clone(steps: int) -> float:
        return clone_policy(model, demonstrations, steps=steps, lr=3e-3, seed=0, batch=16, progress=False)

    before = clone(1)
    after = clone(40)
    assert after < 0.6 * before
    model.save(tmp_path / "model.zip")
    policy = load_policy(f"sb3:{algorithm.upper()}:{tmp_path / 'model.zip'}").make([EpisodeSeed(0, 0)])
    seen = observations(1, 0)
    actions, _ = model.predict(seen, deterministic=True)
    np.testing.assert_allclose(policy.act(seen)[:, 0], actions, atol=1e-6)  # the features' class comes with the file
    with pytest.raises(DatasetError, match="must have images and actions of"):
        clone_policy(model, record(tmp_path / "wrong.hdf5", 32), steps=1, lr=1e-3, seed=0, progress=False)


def test_a_run_clones_learns_is_measured_and_goes_on(toy_folder: Path, demonstrations: Path, tmp_path: Path) -> None:
    words = f"""train rl --out {tmp_path / "run"} --checkpoint {toy_folder} --clone {demonstrations} --clone-steps 2
        --num-envs 2 --horizon 3 --rollout 3 --evaluate-every 6 --episodes 2 --no-truth --no-progress --steps"""
    assert cli.main([*words.split(), "6"]) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.glob("*.zip")} == {"clone.zip", "step-0000006.zip"}
    first = (run / "step-0000006.zip").read_bytes()
    log = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(log.splitlines()[0] + "\n")  # killed before the last evaluation was over
    assert cli.main([*words.split(), "12"]) == 0
    assert (run / "step-0000006.zip").read_bytes() == first and (run / "step-0000012.zip").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 6, 12]
    assert rows[1] == json.loads(log.splitlines()[1])
    assert all(0 <= row["dream"] <= 1 and row["truth"] is None and row["gap"] is None for row in rows)
    other = [word if word != "3" else "2" for word in words.split()]
    assert cli.main([*other, "12"]) == 2  # another run's folder
    assert Score(0.75, 0.5).gap == 0.25
    with pytest.raises(InvalidArgument, match="num_envs must be positive"):
        RLOptions(out=run, num_envs=0)


@pytest.mark.parametrize("world", ["model", "sketch"])
def test_first_the_critic_learns_then_the_actor_and_never_its_encoder(
    toy: Checkpoint, demonstrations: Path, tmp_path: Path, world: Any
) -> None:
    options = RLOptions(
        out=tmp_path,
        clone=demonstrations,
        clone_steps=1,
        world=world,
        critic_steps=8,
        num_envs=2,
        horizon=4,
        rollout=4,
        steps=24,
        evaluate_every=16,
        episodes=1,
        truth=False,
        progress=False,
    )
    steppers = []

    class Watched(LearnedWorld):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            steppers.append(kwargs.get("stepper"))
            super().__init__(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hma_gym.learning.rl.load_checkpoint", lambda *_, **__: toy)
        patch.setattr("hma_gym.learning.rl.LearnedWorld", Watched)
        train_rl(options)
    assert steppers == [Sketch if world == "sketch" else None]
    names = ("clone", "step-0000008", "step-0000024")
    clone, critic, actor = (load_sb3("PPO", tmp_path / f"{name}.zip").policy.state_dict() for name in names)

    def changed(before: dict[str, Any], after: dict[str, Any], part: str) -> bool:
        return any(not torch.equal(before[name], after[name]) for name in before if part in name)

    for part, by_critic, by_actor in (
        ("features_extractor.encoder", False, False),
        ("mlp_extractor.policy_net", False, True),
        ("action_net", False, True),
        ("log_std", False, True),
        ("value_net", True, True),
    ):
        assert changed(clone, critic, part) == by_critic and changed(critic, actor, part) == by_actor, part


def test_learning_on_features_is_learning_on_images(toy: Checkpoint, tmp_path: Path) -> None:
    """The same actions, values and bootstrapped last observations, as images and as what the encoder says of them."""
    options = RLOptions(out=tmp_path, clone=tmp_path, num_envs=2, rollout=4)
    envs = HMAVectorEnv(2, checkpoint=toy, obs_type="pixels_agent_pos", max_episode_steps=3, autoreset_mode="SameStep")
    env = make_sb3_env(envs)
    model = make_model(options, env, toy)
    learner = rl._learner(options, env, model)
    assert learner is not model
    assert rl._learner(dataclasses.replace(options, freeze_encoder=False), env, model) is model
    shown = [env.reset()]
    seen = [learner.env._features(shown[0])]  # type: ignore[attr-defined]
    action = env.action_space.sample()[None].repeat(2, axis=0)
    learner.env.step_async(action)
    told, _, _, _ = learner.env.step_wait()
    shown.append(envs.observe())
    seen.append(told)
    for images, features in zip(shown, seen, strict=True):
        actions = [m.predict(x, deterministic=True)[0] for m, x in ((model, images), (learner, features))]
        np.testing.assert_allclose(*actions, atol=1e-5)
    learner.learn(8)
    rl._copy_heads(learner, model)
    assert model.num_timesteps == 8
    actions = [m.predict(x, deterministic=True)[0] for m, x in ((model, shown[0]), (learner, seen[0]))]
    np.testing.assert_allclose(*actions, atol=1e-5)


@pytest.mark.gl
def test_the_gap_is_measured_in_ground_truth(tmp_path: Path, lift_folder: Path) -> None:
    options = RLOptions(
        out=tmp_path,
        checkpoint=str(lift_folder),
        num_envs=1,
        horizon=2,
        rollout=2,
        steps=2,
        evaluate_every=2,
        episodes=1,
        progress=False,
    )
    path = train_rl(options)
    assert path.name == "step-0000002.zip"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["truth"] == 0.0 and rows[-1]["gap"] == rows[-1]["dream"]
    with pytest.raises(ResumeError, match="other \\['horizon'\\]"):
        train_rl(RLOptions(**{**vars(options), "horizon": 3}))
