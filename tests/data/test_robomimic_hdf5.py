"""Episodes on disk: whole or absent, read back as they were, and every kind of bad file gets one clear error."""

import dataclasses
import pickle
import subprocess
import sys
import textwrap
import time

import h5py
import numpy as np
import pytest

from hma_gym.data.episodes import Episode, agent_pos_from_obs
from hma_gym.data.robomimic_hdf5 import (
    EpisodeWriter,
    merge_shards,
    open_dataset,
    parts_folder,
    shard_files,
    split_of,
)
from hma_gym.errors import DatasetError, ResumeError, StorageError

ENV_ARGS = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}}


def make_episode(seed: int, rows: int = 10, action_dim: int = 7) -> Episode:
    rng = np.random.default_rng(seed)
    obs = {
        "robot0_eef_pos": rng.normal(size=(rows, 3)),
        "robot0_eef_quat": rng.normal(size=(rows, 4)),
        "robot0_gripper_qpos": rng.normal(size=(rows, 2)),
        "object": rng.normal(size=(rows, 10)),
    }
    return Episode(
        images_THWC=rng.integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8),
        agent_pos_TP=agent_pos_from_obs(obs),
        actions_TA=rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        states_TS=rng.normal(size=(rows, 32)),
        rewards_T=np.eye(rows, dtype=np.float32)[-1],
        dones_T=np.arange(rows) == rows - 1,
        obs=obs,
        attrs={"policy": "expert", "competence": 0.5, "category": "held", "success": True, "model_file": "<x/>" * 9999},
    )


def same(a: Episode, b: Episode) -> bool:
    names = ("images_THWC", "agent_pos_TP", "actions_TA", "states_TS", "rewards_T", "dones_T")
    return (
        all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)
        and set(a.obs) == set(b.obs)
        and all(np.array_equal(a.obs[key], b.obs[key]) for key in a.obs)
        and dict(a.attrs) == dict(b.attrs)
    )


@pytest.fixture
def recorded(tmp_path):
    """A merged file of 13 episodes of differing lengths."""
    writer = EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={"seed": 3})
    for index in range(13):
        writer.append(make_episode(index, rows=5 + index))
    return writer.merge()


def test_episodes_come_back_as_they_were_written(recorded):
    dataset = pickle.loads(pickle.dumps(open_dataset(recorded)))
    assert len(dataset) == 13
    assert all(same(dataset[index], make_episode(index, rows=5 + index)) for index in range(13))
    assert dataset.env_args == ENV_ARGS
    assert dataset.info["seed"] == 3
    assert dataset.lengths_N.tolist() == list(range(5, 18))
    assert dataset.column("category") == ["held"] * 13


def test_the_file_is_in_robomimic_layout(recorded):
    with h5py.File(recorded, "r") as file:
        assert file["data"].attrs["total"] == sum(range(5, 18))
        assert file["data/demo_12"].attrs["num_samples"] == 17
        assert file["data/demo_0/obs/agentview_image"].dtype == np.uint8
        assert file["mask/test"][()].tolist() == [b"demo_11"]
        assert file["mask/valid"][()].tolist() == [b"demo_5"]
        assert len(file["mask/train"]) == 11
    assert not parts_folder(recorded).exists()


def test_unmerged_episodes_are_a_dataset_too(tmp_path):
    writer = EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={})
    for index in (7, 5, 11):
        writer.write(index, make_episode(index))
    dataset = open_dataset(tmp_path / "lift.hdf5")
    assert writer.finished() == [5, 7, 11]
    assert same(dataset[1], make_episode(7))
    assert (dataset.split("valid"), dataset.split("train"), dataset.split("test")) == ([0], [1], [2])


def test_merging_twice_gives_the_same_bytes(tmp_path):
    writer = EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={})
    for index in range(3):
        writer.write(index, make_episode(index))
    a, b = (merge_shards(writer.parts, tmp_path / name).read_bytes() for name in ("a.hdf5", "b.hdf5"))
    assert a == b


def test_a_finished_file_is_extended_by_more_episodes(tmp_path):
    writer = EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={"seed": 1})
    for index in (0, 2, 3):
        writer.write(index, make_episode(index))
    writer.merge()
    again = EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={"seed": 1})
    assert again.finished() == [0, 2, 3]
    again.merge()
    for index in (1, 4):
        again.write(index, make_episode(index))
    assert again.finished() == [0, 1, 2, 3, 4]
    dataset = open_dataset(again.merge())
    assert all(same(dataset[index], make_episode(index)) for index in range(5))
    assert [path.name for path in tmp_path.iterdir()] == ["lift.hdf5"]
    with pytest.raises(ResumeError, match="delete it"):
        EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={"seed": 2})


def test_left_over_temporary_files_are_ignored(tmp_path):
    writer = EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={})
    writer.write(0, make_episode(0))
    (writer.parts / ".episode_000001.h5.99.tmp").write_bytes(b"half an epis")
    assert list(shard_files(writer.parts)) == [0]
    writer.merge()
    assert len(open_dataset(tmp_path / "lift.hdf5")) == 1


def test_splits_do_not_depend_on_how_many_were_collected():
    assert [split_of(index) for index in (0, 5, 11, 17, 23)] == ["train", "valid", "test", "valid", "test"]


def test_flat_arrays_and_deltas_keep_inside_episodes(recorded):
    dataset = open_dataset(recorded)
    flat = dataset.flat([2, 4])
    assert flat.starts_N1.tolist() == [0, 7, 16]
    assert np.array_equal(flat.actions_FA, np.concatenate([dataset[2].actions_TA, dataset[4].actions_TA]))
    inside = np.concatenate([np.diff(dataset[n].agent_pos_TP, axis=0) for n in (2, 4)])
    assert np.array_equal(flat.deltas_FP(), inside)


def test_quaternion_signs_do_not_jump_near_the_downward_pose():
    angle_T = np.linspace(-2.5, 2.5, 50)
    quat_T4 = np.stack([np.cos(angle_T / 2), np.sin(angle_T / 2), 0.02 * angle_T, 0.01 * angle_T], axis=1)
    as_robosuite_T4 = np.where(quat_T4[:, 3:] < 0, -quat_T4, quat_T4)
    obs = {
        "robot0_eef_pos": np.zeros((50, 3)),
        "robot0_eef_quat": as_robosuite_T4,
        "robot0_gripper_qpos": np.ones((50, 2)),
    }
    agent_pos_TP = agent_pos_from_obs(obs)
    assert np.allclose(agent_pos_TP[:, 3:7], quat_T4)
    assert np.array_equal(agent_pos_from_obs({key: value[7] for key, value in obs.items()}), agent_pos_TP[7])


def test_resuming_with_other_settings_is_refused(tmp_path):
    EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={"seed": 1}).append(make_episode(0))
    assert EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={"seed": 1}).append(make_episode(1)) == 1
    with pytest.raises(ResumeError, match="other settings.*delete it"):
        EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={"seed": 2})


@pytest.mark.parametrize("rows", [0, 9])
def test_an_episode_of_unequal_rows_is_refused(rows):
    good = make_episode(0)
    with pytest.raises(DatasetError, match=r"row.*got"):
        dataclasses.replace(good, images_THWC=good.images_THWC[:rows])


def test_an_action_that_is_not_finite_is_refused():
    good = make_episode(0)
    actions_TA = good.actions_TA.copy()
    actions_TA[3, 0] = np.nan
    with pytest.raises(DatasetError, match="row 3"):
        dataclasses.replace(good, actions_TA=actions_TA)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.hdf5.*hma-gym collect"):
        open_dataset(tmp_path / "nowhere.hdf5")


def test_a_truncated_file_is_named(recorded):
    recorded.write_bytes(recorded.read_bytes()[:-1000])
    with pytest.raises(DatasetError, match="truncated"):
        open_dataset(recorded)


def test_a_file_that_is_not_hdf5_is_named(tmp_path):
    (tmp_path / "a.hdf5").write_text("hello")
    with pytest.raises(DatasetError, match="not an HDF5 file"):
        open_dataset(tmp_path / "a.hdf5")


def test_a_foreign_hdf5_is_named(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(DatasetError, match="no group 'data', only \\['weights'\\]"):
        open_dataset(tmp_path / "a.hdf5")


def damage_no_demo(file):
    for name in list(file["data"]):
        del file["data"][name]


def damage_actions(file):
    del file["data/demo_3/actions"]


def damage_rows(file):
    file["data/demo_3"].attrs["num_samples"] = 9


def damage_dims(file):
    del file["data/demo_3/actions"]
    file["data/demo_3/actions"] = np.zeros((8, 6))


def damage_version(file):
    file["data"].attrs["hma_gym"] = '{"format": 99}'


def damage_json(file):
    file["data"].attrs["env_args"] = "{"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_no_demo, "no demo_<i>"),
        (damage_actions, "no dataset 'actions'"),
        (damage_rows, "says 9 rows.*actions have shape"),
        (damage_dims, "action dims: demo_0 has 7, demo_3 has 6"),
        (damage_version, "format 99.*upgrade"),
        (damage_json, "must be JSON"),
    ],
)
def test_each_kind_of_damage_is_named_on_opening(recorded, damage, message):
    with h5py.File(recorded, "r+") as file:
        damage(file)
    with pytest.raises(DatasetError, match=message):
        open_dataset(recorded)


def test_rows_that_disagree_are_named_on_reading(recorded):
    with h5py.File(recorded, "r+") as file:
        del file["data/demo_3/rewards"]
        file["data/demo_3/rewards"] = np.zeros(2)
    with pytest.raises(DatasetError, match="demo_3: rewards_T must have .* 8 rows"):
        open_dataset(recorded)[3]


def test_damaged_images_are_named_on_reading(recorded):
    with h5py.File(recorded, "r") as file:
        chunk = file["data/demo_3/obs/agentview_image"].id.get_chunk_info(0)
    content = bytearray(recorded.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + 99] = b"x" * 99
    recorded.write_bytes(content)
    with pytest.raises(DatasetError, match="demo_3: it cannot be read"):
        open_dataset(recorded)[3]


def test_a_low_dim_file_opens_and_says_how_to_get_images(recorded):
    with h5py.File(recorded, "r+") as file:
        for demo in file["data"].values():
            del demo["obs/agentview_image"]
    dataset = open_dataset(recorded)
    assert dataset.image_key is None
    assert dataset.flat().agent_pos_FP.shape[1] == 9
    with pytest.raises(DatasetError, match="hma-gym data import"):
        dataset[0]


def test_proprioception_is_made_from_robosuite_keys(recorded):
    expected = open_dataset(recorded)[0].agent_pos_TP
    with h5py.File(recorded, "r+") as file:
        for demo in file["data"].values():
            del demo["obs/agent_pos"]
    assert np.array_equal(open_dataset(recorded)[0].agent_pos_TP, expected)
    with h5py.File(recorded, "r+") as file:
        del file["data/demo_0/obs/robot0_eef_quat"]
    with pytest.raises(DatasetError, match="robot0_eef_quat"):
        open_dataset(recorded)[0]


def test_an_unknown_split_or_camera_is_named(recorded):
    with pytest.raises(DatasetError, match="'holdout'.*'test', 'train', 'valid'"):
        open_dataset(recorded).split("holdout")
    with pytest.raises(DatasetError, match="'wrist'.*agentview_image"):
        open_dataset(recorded, camera="wrist")


def test_a_path_through_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another path"):
        EpisodeWriter(tmp_path / "file" / "lift.hdf5", env_args=ENV_ARGS, info={})


def test_merging_nothing_is_refused(tmp_path):
    writer = EpisodeWriter(tmp_path / "lift.hdf5", env_args=ENV_ARGS, info={})
    with pytest.raises(DatasetError, match="no finished episode"):
        writer.merge()


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A real write failure: the process's own file size limit stands in for a full disk."""
    script = textwrap.dedent(
        f"""
        import resource
        import numpy as np
        from hma_gym.data.episodes import Episode
        from hma_gym.data.robomimic_hdf5 import EpisodeWriter
        from hma_gym.errors import StorageError

        def episode(rows):
            noise = np.random.default_rng(0).integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)
            zeros = np.zeros((rows, 2))
            return Episode(noise, zeros, zeros, zeros, zeros[:, 0], zeros[:, 0] > 1)

        writer = EpisodeWriter({str(tmp_path / "lift.hdf5")!r}, env_args={{}}, info={{}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        for index in range(4):
            writer.write(index, episode(10))
        for attempt in (lambda: writer.write(4, episode(100)), writer.merge):
            try:
                attempt()
            except StorageError as error:
                print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("cannot write") == 2, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lift.hdf5.parts"]
    assert sorted(p.name for p in parts_folder(tmp_path / "lift.hdf5").iterdir()) == [
        f"episode_{index:06d}.h5" for index in range(4)
    ]
    assert len(open_dataset(tmp_path / "lift.hdf5")) == 4


RECORDER = """
import sys
import numpy as np
from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter

writer = EpisodeWriter(sys.argv[1], env_args={}, info={})
print("ready", flush=True)
for index in sorted(set(range(30)) - set(writer.finished())):
    rng = np.random.default_rng(index)
    zeros = np.zeros((8, 2))
    images = rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    writer.write(index, Episode(images, zeros, zeros, zeros, zeros[:, 0], zeros[:, 0] > 1))
print("merging", flush=True)
writer.merge()
"""


def test_killed_while_writing_or_merging_it_resumes_to_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole.hdf5", tmp_path / "killed.hdf5"
    subprocess.run([sys.executable, "-c", RECORDER, str(whole)], check=True, capture_output=True)
    for moment, delay in (("ready", 0.01), ("ready", 0.04), ("merging", 0.005)):
        process = subprocess.Popen([sys.executable, "-c", RECORDER, str(killed)], stdout=subprocess.PIPE, text=True)
        with process:
            while process.stdout.readline() != f"{moment}\n":
                pass
            time.sleep(delay)
            process.kill()
        recorded = open_dataset(killed) if killed.exists() or shard_files(parts_folder(killed)) else ()
        assert all(len(episode) == 8 for episode in recorded)
    subprocess.run([sys.executable, "-c", RECORDER, str(killed)], check=True, capture_output=True)
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.hdf5", "whole.hdf5"]
