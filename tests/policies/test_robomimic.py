"""robomimic's checkpoints as policies, and robomimic's own rollouts in a learned environment."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from toy_policies import SIZE, observations

from hma_gym.envs.robomimic_env import make_robomimic_env
from hma_gym.errors import CheckpointError, EnvironmentState, InvalidArgument
from hma_gym.policies.loading import load_policy
from hma_gym.policies.robomimic import RobomimicPolicy, load_robomimic
from hma_gym.robomimic_compat import import_robomimic

pytestmark = pytest.mark.robomimic
KEYS = {"agentview_image": [3, SIZE, SIZE], "agent_pos": [9], "robot0_eef_quat": [4]}


def robomimic(module: str) -> Any:
    return import_robomimic(f"robomimic.{module}", purpose="this test")


def trained(folder: Path, *, rnn: bool, low_dim: tuple[str, ...] = ("agent_pos", "robot0_eef_quat")) -> Path:
    """A checkpoint that robomimic's own algorithm trained for one step and its own code saved."""
    config = robomimic("config").config_factory("bc")
    config.train.cuda = False
    config.train.seq_length = 3 if rnn else 1
    config.observation.modalities.obs.low_dim = list(low_dim)
    config.observation.modalities.obs.rgb = ["agentview_image"]
    core = config.observation.encoder.rgb.core_kwargs
    core.feature_dimension = 8
    core.backbone_class = "ShallowConv"
    core.backbone_kwargs = {}
    config.algo.actor_layer_dims = (16,)
    config.algo.rnn.enabled = rnn
    config.algo.rnn.hidden_dim = 12
    config.algo.rnn.horizon = 3
    config.algo.gmm.enabled = False
    shapes = {**KEYS, "object": [10]}
    shapes = {key: shapes[key] for key in ("agentview_image", *low_dim)}
    make = robomimic("algo").algo_factory  # the import registers the encoders
    robomimic("utils.obs_utils").initialize_obs_utils_with_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make("bc", config, shapes, 7, torch.device("cpu"))
        model.set_train()
        steps = 3 if rnn else 1
        batch = {
            "obs": {key: torch.rand(2, steps, *shape) for key, shape in shapes.items()},
            "actions": torch.rand(2, steps, 7),
        }
        model.train_on_batch(model.process_batch_for_training(batch), epoch=1)
    path = folder / f"model_{'rnn' if rnn else 'mlp'}_{len(low_dim)}.pth"
    robomimic("utils.train_utils").save_model(
        model,
        config,
        env_meta={},
        shape_meta={"all_shapes": shapes, "ac_dim": 7, "all_obs_keys": list(shapes)},
        ckpt_path=str(path),
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("robomimic")


@pytest.fixture(scope="module", params=[False, True], ids=["bc", "bc-rnn"])
def checkpoint(request: pytest.FixtureRequest, folder: Path) -> Path:
    return trained(folder, rnn=request.param)


def their_view(seen: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """One environment's observation as robomimic's environments give it."""
    pose = seen["agent_pos"][n]
    return {
        "agentview_image": seen["pixels"][n].transpose(2, 0, 1).astype(np.float32) / 255,
        "agent_pos": pose,
        "robot0_eef_quat": pose[3:7] if pose[6] >= 0 else -pose[3:7],
    }


def test_n_environments_are_n_of_robomimics_own_rollout_policies(checkpoint: Path) -> None:
    loaded = load_robomimic(checkpoint)
    ours = RobomimicPolicy(loaded, 3)
    theirs = []
    for _ in range(3):
        single = copy.copy(loaded.rollout_policy)
        single.policy = copy.copy(single.policy)
        single.start_episode()
        theirs.append(single)
    with pytest.raises(InvalidArgument, match="call reset"):
        ours.act(observations(3, 0))
    ours.reset(np.array([True, True, True]))
    for step in range(8):  # beyond two horizons of the recurrent network
        if step == 4:  # in the middle of one
            ours.reset(np.array([False, True, False]))
            theirs[1].start_episode()
        seen = observations(3, step)
        actions = ours.act(seen)
        assert actions.shape == (3, 1, 7)
        for n, single in enumerate(theirs):
            with torch.no_grad():
                np.testing.assert_allclose(actions[n, 0], single(their_view(seen, n)), atol=1e-5)


def test_it_loads_by_its_path(checkpoint: Path) -> None:
    source = load_policy(str(checkpoint))
    assert source.family == ("robomimic bc-rnn" if "rnn" in checkpoint.name else "robomimic bc") and source.digest


def test_foreign_observations_and_files_are_refused(folder: Path) -> None:
    path = trained(folder, rnn=False, low_dim=("agent_pos", "object", "robot0_eef_quat"))
    with pytest.raises(CheckpointError, match=r"needs the observations \['object'\]"):
        load_robomimic(path)
    (folder / "none.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint of robomimic"):
        load_robomimic(folder / "none.pth")


@pytest.fixture
def learned(toy_folder: Path) -> Iterator[gymnasium.Env[Any, Any]]:
    env = gymnasium.make("HMA-Lift-v0", checkpoint=toy_folder, obs_type="pixels_agent_pos", render_size=32)
    yield env
    env.close()


def test_robomimics_rollouts_run_its_policy_in_the_learned_world(
    checkpoint: Path, learned: gymnasium.Env[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_robomimic(checkpoint)
    env = make_robomimic_env(learned, seed=4, starts=[1, 3])
    with torch.no_grad():
        logs, _ = robomimic("utils.train_utils").rollout_with_stats(
            loaded.rollout_policy, {"learned": env}, horizon=5, num_episodes=2, verbose=True
        )
    assert logs["learned"]["Horizon"] == 5 and logs["learned"]["Success_Rate"] in (0.0, 0.5, 1.0)
    # The same episode by our own adapter in the same environment.
    policy = RobomimicPolicy(loaded, 1)
    policy.reset(np.array([True]))
    observation, info = learned.reset(seed=5, options={"start": 3})
    for _ in range(5):
        actions = policy.act({key: value[None] for key, value in observation.items()})
        observation, _, _, _, info = learned.step(actions[0, 0])
    np.testing.assert_array_equal(env.get_observation()["agent_pos"], observation["agent_pos"])
    assert env.is_success() == {"task": info["is_success"]}


def test_the_learned_world_is_a_whole_env_base(learned: gymnasium.Env[Any, Any]) -> None:
    env = make_robomimic_env(learned)
    assert isinstance(env, robomimic("envs.env_base").EnvBase)
    with pytest.raises(EnvironmentState, match="call reset"):
        env.get_observation()
    first = env.reset()
    assert first["agentview_image"].shape == (3, SIZE, SIZE) and 0 <= first["agentview_image"].min() <= 1
    state = env.get_state()
    action = np.full(7, 0.5)
    after = env.step(action)
    env.reset_to(state)
    np.testing.assert_array_equal(env.get_observation()["agent_pos"], first["agent_pos"])
    np.testing.assert_array_equal(env.step(action)[0]["agentview_image"], after[0]["agentview_image"])
    assert env.action_dimension == 7 and env.name == "HMA-Lift-v0" and not env.is_done()
    assert env.render(mode="rgb_array").shape == (32, 32, 3)
    assert env.serialize()["env_name"] == "HMA-Lift-v0" and env.get_reward() == after[1]
    for call in (env.get_goal, env.set_goal, lambda: env.render(), env.create_for_data_processing):
        with pytest.raises(InvalidArgument):
            call()


def test_images_alone_are_refused(toy_folder: Path) -> None:
    env = gymnasium.make("HMA-Lift-v0", checkpoint=toy_folder)
    with pytest.raises(InvalidArgument, match="obs_type='pixels_agent_pos'"):
        make_robomimic_env(env)
    env.close()
