"""The collector: same seed, same data, whatever the workers or the interruptions; and its errors."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from hma_gym.collection.collect import (
    DEFAULT_MIXTURE,
    CollectConfig,
    Ingredient,
    collect,
    draw_policy,
    record_episode,
    scripted_player,
)
from hma_gym.data.robomimic_hdf5 import open_dataset, shard_files
from hma_gym.envs.ground_truth import GroundTruthEnv
from hma_gym.errors import InvalidArgument, ResumeError, StorageError
from hma_gym.policies.scripted import MODES

STEPS, EPISODES, SIZE = 4, 5, 16


def config(out: Path, **changes: object) -> CollectConfig:
    small = CollectConfig(out, episodes=EPISODES, workers=1, seed=7, steps=STEPS, image_size=SIZE)
    return dataclasses.replace(small, **changes)  # type: ignore[arg-type]


def content(path: Path) -> dict[str, object]:
    """Every dataset and attribute of an HDF5 file."""
    found: dict[str, object] = {}
    with h5py.File(path) as file:

        def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
            for key, value in item.attrs.items():
                found[f"{name}@{key}"] = value
            if isinstance(item, h5py.Dataset):
                found[name] = (item.dtype.str, item[()].tolist())

        file.visititems(visit)
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted collection by one process."""
    return collect(config(tmp_path_factory.mktemp("collect") / "one.hdf5"), progress=False)


def test_the_mixture_holds_every_mode_and_failures_prevail_over_experts() -> None:
    policies = [draw_policy(CollectConfig(Path("unused")), index) for index in range(1200)]
    modes = [policy.mode for policy in policies]
    assert set(modes) == set(MODES) - {"roam", "random", "clumsy"}
    weights = sum(part.weight for part in DEFAULT_MIXTURE if part.mode == "expert")
    assert modes.count("expert") / 1200 == pytest.approx(weights / sum(p.weight for p in DEFAULT_MIXTURE), abs=0.05)
    competences = np.array([policy.competence for policy in policies if policy.mode == "expert"])
    assert (competences == 1.0).mean() == pytest.approx(0.10 / 0.39, abs=0.06)
    assert competences.min() < 0.35


def test_a_share_of_the_episodes_roams() -> None:
    some = CollectConfig(Path("unused"), roam=0.25, random=0.1, clumsy=0.1)
    modes = [draw_policy(some, index).mode for index in range(800)]
    assert modes.count("roam") / 800 == pytest.approx(0.25, abs=0.05) and set(modes) == set(MODES)
    assert modes.count("clumsy") / 800 == pytest.approx(0.1, abs=0.04)
    assert {
        draw_policy(dataclasses.replace(some, roam=1.0, random=0.0, clumsy=0.0), index).mode for index in range(50)
    } == {"roam"}


@pytest.mark.gl
def test_without_images_the_same_happens_and_the_file_is_a_low_dim_one(recorded: Path, tmp_path: Path) -> None:
    blind = collect(config(tmp_path / "low_dim.hdf5", images=False), progress=False)
    seen, unseen = content(recorded), content(blind)
    images = {key for key in seen if "agentview_image" in key}
    told = "data@hma_gym"  # what was asked for differs
    assert len(images) == EPISODES
    assert {key: value for key, value in seen.items() if key not in images | {told}} == {
        key: value for key, value in unseen.items() if key != told
    }
    dataset = open_dataset(blind)
    assert dataset.image_key is None and dataset.without_images(0).images_THWC.shape == (STEPS, 0, 0, 3)
    np.testing.assert_array_equal(dataset.without_images(1).actions_TA, open_dataset(recorded)[1].actions_TA)


@pytest.mark.gl
def test_a_file_has_the_rows_that_were_asked_for(recorded: Path) -> None:
    data = open_dataset(recorded)
    assert len(data) == EPISODES and not recorded.with_name("one.hdf5.parts").exists()
    assert data.info["collector"]["seed"] == 7 and data.env_args["env_name"] == "Lift"
    assert len(data.env_args["camera_projection"]) == 12
    episode = data[0]
    assert episode.images_THWC.shape == (STEPS, SIZE, SIZE, 3)
    assert episode.dones_T.tolist() == [False] * (STEPS - 1) + [True]
    assert set(episode.obs) >= {
        "robot0_eef_pos",
        "robot0_eef_quat",
        "robot0_gripper_qpos",
        "robot0_joint_pos",
        "object",
    }
    np.testing.assert_allclose(episode.obs["object"][:, :3], episode.states_TS[:, 10:13], atol=1e-6)
    assert {"policy", "mode", "competence", "category", "success", "success_ever", "seed"} <= set(episode.attrs)


@pytest.mark.gl
def test_the_environment_gives_the_recorded_episode_again(recorded: Path) -> None:
    episode = open_dataset(recorded)[1]
    env = GroundTruthEnv(obs_type="pixels_agent_pos", image_size=SIZE)
    for start in ({"seed": int(episode.attrs["seed"])}, {"options": {"state": episode.states_TS[0]}}):
        observation, _ = env.reset(**start)  # type: ignore[arg-type]
        for t in range(STEPS):
            np.testing.assert_array_equal(observation["pixels"], episode.images_THWC[t])
            np.testing.assert_array_equal(observation["agent_pos"], episode.agent_pos_TP[t])
            np.testing.assert_array_equal(env.simulation.flattened_state(), episode.states_TS[t])
            observation, reward, *_ = env.step(episode.actions_TA[t])
            assert reward == episode.rewards_T[t]
    again = record_episode(env.simulation, config(recorded), scripted_player(config(recorded), 1), 1)
    np.testing.assert_array_equal(again.images_THWC, episode.images_THWC)
    env.close()


def test_policies_need_images_and_do_not_roam() -> None:
    with pytest.raises(InvalidArgument, match="images must be True with policies"):
        CollectConfig(Path("unused"), policies=("a=b",), images=False)
    with pytest.raises(InvalidArgument, match="are for scripts only, got 0.1, 0.0 and 0.0 with 1"):
        CollectConfig(Path("unused"), policies=("a=b",), roam=0.1)
    with pytest.raises(
        InvalidArgument, match="roam, random and clumsy must be shares of at most 1 together, .* got 0.6, 0.0 and 0.5"
    ):
        CollectConfig(Path("unused"), roam=0.6, clumsy=0.5)


def test_noise_is_for_policies() -> None:
    with pytest.raises(InvalidArgument, match="action_noise must be finite, at least 0, and is for policies only"):
        CollectConfig(Path("unused"), action_noise=0.1)


@pytest.mark.gl
def test_policies_are_recorded_closed_loop(tmp_path: Path) -> None:
    """They take turns, are shown each step's image and pose, and their chunks are played to the end."""
    names = ("python:toy_policies:watcher", "python:toy_policies:half_dim_zero")
    toy = config(tmp_path / "a.hdf5", policies=names, episodes=2, steps=5)
    first = open_dataset(collect(toy, progress=False))
    watcher, half = first[0], first[1]
    assert (half.attrs["policy"], half.attrs["category"]) == ("python:toy_policies:half_dim_zero", "missed")
    np.testing.assert_array_equal(half.actions_TA[:, 0], 0.5)
    # every action of the watcher is the mean brightness of its image, one step late: its chunks are of two actions
    seen = watcher.images_THWC.mean(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(watcher.actions_TA[:, 0], seen[[0, 0, 2, 2, 4]], atol=1e-6)
    np.testing.assert_allclose(watcher.actions_TA[:, 1], [0, 0.01, 0.02, 0.03, 0.04], atol=1e-6)
    noisy = open_dataset(collect(dataclasses.replace(toy, out=tmp_path / "b.hdf5", action_noise=0.3), progress=False))
    assert 0.0 < float(noisy[1].attrs["action_noise"]) < 0.3
    assert noisy[1].actions_TA[:, 0].std() == pytest.approx(float(noisy[1].attrs["action_noise"]), rel=0.9)
    with pytest.raises(ResumeError):
        collect(dataclasses.replace(toy, policies=names[:1]), progress=False)


@pytest.mark.gl
def test_two_workers_record_what_one_does(recorded: Path, tmp_path: Path) -> None:
    before = dict(os.environ)
    two = collect(config(tmp_path / "two.hdf5", workers=2), progress=False)
    assert content(two) == content(recorded)
    assert dict(os.environ) == before


@pytest.mark.gl
def test_killed_at_any_moment_it_leaves_whole_episodes_and_resumes_to_the_same(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed.hdf5"
    code = (
        "import sys\nfrom pathlib import Path\nfrom hma_gym.collection.collect import CollectConfig, collect\n"
        "if __name__ == '__main__':\n"
        f"    collect(CollectConfig(Path(sys.argv[1]), episodes={EPISODES}, workers=2, seed=7, steps={STEPS}, "
        f"image_size={SIZE}), progress=False)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), str(out)], start_new_session=True)
    parts = Path(f"{out}.parts")
    while not shard_files(parts) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 90
    while _alive_in_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive_in_session(process.pid), "workers outlived the collector"
    if not out.exists():  # else it was faster than the kill
        left = open_dataset(out)
        assert 1 <= len(left) <= EPISODES
        assert all(len(left[index]) == STEPS for index in range(len(left)))
    resumed = collect(config(out), progress=False)
    assert content(resumed) == content(recorded)
    assert [entry.name for entry in tmp_path.iterdir() if "tmp" in entry.name or "parts" in entry.name] == []


def _alive_in_session(session: int) -> list[int]:
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                alive.append(int(entry.name))
    return alive


@pytest.mark.gl
def test_a_full_disk_ends_it_with_one_error_and_the_same_command_goes_on(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "full.hdf5"
    real = os.replace

    def full_from_the_third(source: str, target: str) -> None:
        if str(target).endswith("episode_000002.h5"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", full_from_the_third)
    with pytest.raises(StorageError, match="disk is full: free some space and start the same command again"):
        collect(config(out), progress=False)
    monkeypatch.undo()
    assert len(open_dataset(out)) == 2
    with pytest.raises(ResumeError, match="made with other settings"):
        collect(config(out, seed=8), progress=False)
    assert len(open_dataset(collect(config(out, episodes=2), progress=False))) == 2  # a finished, shorter file
    assert content(collect(config(out), progress=False)) == content(recorded)  # extended


@pytest.mark.gl
def test_an_error_in_a_worker_reaches_the_caller_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "blocked.hdf5"
    Path(f"{out}.parts").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot write"):
        collect(config(out, workers=2, episodes=1), progress=False)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*a part of the path is a file"):
        collect(config(tmp_path / "file" / "x.hdf5"), progress=False)


def test_wrong_settings_say_what_is_right(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="workers must be at least 1, got 0"):
        config(tmp_path, workers=0)
    with pytest.raises(InvalidArgument, match="mixture: mode must be one of .*juggle"):
        config(tmp_path, mixture=(Ingredient(1.0, "juggle"),))
    with pytest.raises(InvalidArgument, match="mixture needs non-negative weights"):
        config(tmp_path, mixture=())
    with pytest.raises(InvalidArgument, match="'stack' has no scripted policy.*data import"):
        config(tmp_path, task="stack")
