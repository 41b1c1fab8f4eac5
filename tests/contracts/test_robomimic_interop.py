"""robomimic's own tools read what we write: dataset info, SequenceDataset, and its train.py on both kinds of input."""

import importlib
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from hma_gym.data.episodes import Episode, agent_pos_from_obs
from hma_gym.data.robomimic_hdf5 import EpisodeWriter
from hma_gym.robomimic_compat import import_robomimic, make_torchvision_importable

EPISODES, ROWS = 12, 9

pytestmark = pytest.mark.robomimic


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    writer = EpisodeWriter(
        tmp_path_factory.mktemp("interop") / "lift.hdf5",
        env_args={"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"], "control_freq": 20}},
        info={"seed": 0},
    )
    for seed in range(EPISODES):
        rng = np.random.default_rng(seed)
        obs = {
            "robot0_eef_pos": rng.normal(size=(ROWS, 3)),
            "robot0_eef_quat": rng.normal(size=(ROWS, 4)),
            "robot0_gripper_qpos": rng.normal(size=(ROWS, 2)),
            "object": rng.normal(size=(ROWS, 10)),
        }
        writer.append(
            Episode(
                images_THWC=rng.integers(0, 256, (ROWS, 64, 64, 3), dtype=np.uint8),
                agent_pos_TP=agent_pos_from_obs(obs),
                actions_TA=rng.uniform(-1, 1, (ROWS, 7)).astype(np.float32),
                states_TS=rng.normal(size=(ROWS, 32)),
                rewards_T=np.zeros(ROWS, np.float32),
                dones_T=np.arange(ROWS) == ROWS - 1,
                obs=obs,
                attrs={"model_file": "<mujoco/>", "success": False},
            )
        )
    return writer.merge()


@pytest.fixture
def threads():
    """robomimic's train sets torch's thread count and leaves it so."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def robomimic(module):
    return import_robomimic(f"robomimic.{module}", purpose="this test")


def test_torchvision_imports_and_runs_beside_a_cpu_only_torch():
    make_torchvision_importable()
    make_torchvision_importable()
    resnet18 = importlib.import_module("torchvision.models").resnet18()
    assert resnet18(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_get_dataset_info_reads_the_file(recorded):
    command = [sys.executable, "-m", "robomimic.scripts.get_dataset_info", "--dataset", str(recorded)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in (
        f"total transitions: {EPISODES * ROWS}",
        f"total trajectories: {EPISODES}",
        "filter key train with 10 demos",
        "filter key valid with 1 demos",
        '"env_name": "Lift"',
        "observation key agentview_image with shape (9, 64, 64, 3)",
    ):
        assert line in done.stdout


def test_sequence_dataset_reads_the_file(recorded):
    robomimic("utils.obs_utils").initialize_obs_utils_with_obs_specs(
        {"obs": {"low_dim": ["agent_pos", "object"], "rgb": ["agentview_image"]}}
    )
    dataset = robomimic("utils.dataset").SequenceDataset(
        str(recorded),
        obs_keys=("agent_pos", "object", "agentview_image"),
        dataset_keys=("actions", "rewards", "dones"),
        frame_stack=2,
        seq_length=3,
        hdf5_cache_mode="low_dim",
        filter_by_attribute="valid",
        load_next_obs=False,
    )
    assert len(dataset) == ROWS
    sample = dataset[4]
    with h5py.File(recorded, "r") as file:
        assert np.array_equal(sample["actions"], file["data/demo_5/actions"][3:7])
        assert np.array_equal(sample["obs"]["agentview_image"], file["data/demo_5/obs/agentview_image"][3:7])
    dataset.close_and_delete_hdf5_handle()


@pytest.mark.parametrize(
    ("low_dim", "rgb"),
    [
        (["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"], []),
        (["agent_pos"], ["agentview_image"]),
    ],
    ids=["low_dim", "image"],
)
def test_behaviour_cloning_trains_two_epochs_through_robomimic_train(recorded, tmp_path, capsys, threads, low_dim, rgb):
    config = robomimic("config").config_factory("bc")
    config.experiment.name = "interop"
    config.experiment.validate = True
    config.experiment.logging.terminal_output_to_txt = False
    config.experiment.logging.log_tb = False
    config.experiment.save.every_n_epochs = 2
    config.experiment.epoch_every_n_steps = 2
    config.experiment.validation_epoch_every_n_steps = 1
    # robomimic 0.3.0 drives robosuite through mujoco_py, which current MuJoCo does not have: no rollouts.
    config.experiment.rollout.enabled = False
    config.train.data = str(recorded)
    config.train.output_dir = str(tmp_path)
    config.train.hdf5_cache_mode = "low_dim"
    config.train.hdf5_filter_key = "train"
    config.train.hdf5_validation_filter_key = "valid"
    config.train.num_epochs = 2
    config.train.batch_size = 4
    config.train.cuda = False
    config.observation.modalities.obs.low_dim = low_dim
    config.observation.modalities.obs.rgb = rgb
    config.observation.encoder.rgb.core_kwargs.feature_dimension = 8
    config.observation.encoder.rgb.core_kwargs.backbone_class = "ShallowConv"
    config.observation.encoder.rgb.core_kwargs.backbone_kwargs = {}
    config.algo.actor_layer_dims = (16,)
    config.lock()

    robomimic("scripts.train").train(config, device="cpu")

    printed = capsys.readouterr().out
    assert "Train Epoch 2" in printed and "Validation Epoch 2" in printed
    checkpoints = list(tmp_path.glob("interop/*/models/model_epoch_2*.pth"))
    assert len(checkpoints) == 1
