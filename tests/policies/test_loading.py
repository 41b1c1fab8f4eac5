"""Policies by name, functions as policies, and the script that sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_policies import observations, toy_diffusion

from hma_gym.errors import CheckpointError, DatasetError, InvalidArgument, UnknownName
from hma_gym.policies.diffusion import save_diffusion
from hma_gym.policies.functions import FunctionPolicy
from hma_gym.policies.loading import EpisodeSeed, load_policy, split_label
from hma_gym.policies.protocol import Policy
from hma_gym.policies.scripted import ScriptedConfig, Situation
from hma_gym.policies.sighted import SightedLift, believed_state, object_targets

EPISODES = [EpisodeSeed(0, 10), EpisodeSeed(1, 11)]
ALL = np.array([True, True])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = toy_diffusion()
    return save_diffusion(tmp_path_factory.mktemp("run") / "step-1", model.config, model.state_dict(), {})


def acts(policy: Policy) -> np.ndarray:
    policy.reset(ALL)
    return np.concatenate([policy.act(observations(2, step)) for step in range(3)], axis=1)


def test_every_kind_of_name_gives_a_policy_that_its_episodes_decide(folder: Path) -> None:
    for spec, family, has_weights in (
        (str(folder), "diffusion unet", True),
        (f"diffusion:{folder}", "diffusion unet", True),
        (f"sighted:expert:0.5:{folder}", "sighted script", True),
        ("random", "random", False),
        ("python:toy_policies:random", "python toy_policies:random", False),
    ):
        source = load_policy(spec)
        assert source.family == family and bool(source.digest) == has_weights
        policy = source.make(EPISODES)
        assert isinstance(policy, Policy)
        first = acts(policy)
        assert first.shape[0] == 2 and first.shape[2] == 7
        np.testing.assert_array_equal(first, acts(load_policy(spec).make(EPISODES)))
        assert not np.array_equal(first, acts(source.make([EpisodeSeed(0, 12), EpisodeSeed(1, 13)])))


def test_labels(folder: Path) -> None:
    assert split_label("dp=runs/a") == ("dp", "runs/a")
    assert split_label(str(folder)) == (f"{folder.parent.name}-step-1", str(folder))
    assert split_label("random") == ("random", "random")


def test_unknown_and_malformed_names_say_what_is_right(folder: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown policy 'runs/none'.*Or give the path of a checkpoint that exists"):
        load_policy("runs/none")
    with pytest.raises(InvalidArgument, match="sighted:MODE:COMPETENCE:FOLDER, got 'sighted:expert'"):
        load_policy("sighted:expert")
    with pytest.raises(UnknownName, match="python:nowhere:f"):
        load_policy("python:nowhere:f")
    with pytest.raises(InvalidArgument, match="takes nothing after its name"):
        load_policy("random:3")
    with pytest.raises(UnknownName, match="unknown algorithm of stable-baselines3 'DQN'"):
        load_policy("sb3:DQN:a.zip")
    with pytest.raises(CheckpointError, match="must hold config.json"):
        load_policy(str(folder.parent))


def test_a_function_may_give_single_actions() -> None:
    policy = FunctionPolicy(lambda observation: np.ones((2, 7)))
    assert policy.act(observations(2, 0)).shape == (2, 1, 7)


def test_the_sighted_script_believes_what_it_sees() -> None:
    seen = np.array([0.01, -0.02, 0.83, np.cos(4 * 0.3), np.sin(4 * 0.3)])
    pose = np.array([-0.1, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.04, -0.04])
    situation = Situation.from_privileged(believed_state(seen, pose))
    assert situation.cube_yaw == pytest.approx(0.3)
    assert situation.finger_yaw % np.pi == pytest.approx(np.pi / 2)
    np.testing.assert_allclose(situation.cube, seen[:3])
    np.testing.assert_allclose(situation.tilt, 0, atol=1e-12)
    quaternion = np.array([[0.0, 0.0, np.sin(0.15), np.cos(0.15)]])
    obs = {"object": np.concatenate([seen[None, :3], quaternion, np.zeros((1, 3))], axis=1)}
    np.testing.assert_allclose(object_targets(obs, "here")[0], seen, atol=1e-6)
    with pytest.raises(DatasetError, match="here: obs/object"):
        object_targets({}, "here")


def test_the_sighted_script_needs_an_eye_and_agent_pos() -> None:
    policy = SightedLift(ScriptedConfig(), toy_diffusion(), [0, 1])
    with pytest.raises(InvalidArgument, match="call reset"):
        policy.act(observations(2, 0))
    policy.reset(ALL)
    with pytest.raises(InvalidArgument, match="needs observation"):
        policy.act(observations(2, 0)["pixels"])
    blind = toy_diffusion()
    blind = type(blind)(type(blind.config)(**{**blind.config.to_json(), "auxiliary_dim": 0}))
    with pytest.raises(InvalidArgument, match="--read-object"):
        SightedLift(ScriptedConfig(), blind, [0])
