"""Stills: pictures of recorded states with the object elsewhere, the same for a seed, whole after a kill."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from hma_gym.collection import stills
from hma_gym.collection.collect import CollectConfig, collect
from hma_gym.collection.stills import DEEPEST, WIDER, StillsConfig, another_place, lying, make_stills
from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import open_dataset, parts_folder
from hma_gym.envs.simulation import Simulation
from hma_gym.envs.tasks import get_task
from hma_gym.errors import DatasetError, InvalidArgument, ResumeError
from hma_gym.judges.rows import success_by_row

SIZE, EACH = 16, 10
CUBE = slice(10, 17)  # of a state: time, 9 joints, then the cube


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arms that roam, without images: 2 episodes of 40 rows."""
    out = tmp_path_factory.mktemp("stills") / "roam.hdf5"
    return collect(CollectConfig(out, episodes=2, workers=1, seed=3, steps=40, roam=1.0, images=False), progress=False)


@pytest.fixture(autouse=True)
def _small_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stills, "STILLS_EACH", EACH)


@pytest.fixture(scope="module")
def made(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stills, "STILLS_EACH", EACH)
        return make_stills(config(recorded, tmp_path_factory.mktemp("made") / "stills.hdf5"), progress=False)


def config(recorded: Path, out: Path, **changes: object) -> StillsConfig:
    small = StillsConfig((recorded,), out, every=2, moved=0.5, seed=5, image_size=SIZE)
    return dataclasses.replace(small, **changes)  # type: ignore[arg-type]


def same(a: Episode, b: Episode) -> bool:
    arrays = ("images_THWC", "agent_pos_TP", "states_TS", "rewards_T")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays) and a.attrs == b.attrs


def taken(recorded: Path, every: int = 2) -> np.ndarray:
    dataset = open_dataset(recorded)
    return np.concatenate([dataset.arrays(n)["states"][::every] for n in range(len(dataset))])


@pytest.mark.gl
def test_every_still_is_a_recorded_arm_and_about_half_have_the_object_elsewhere(recorded: Path, made: Path) -> None:
    dataset = open_dataset(made)
    assert len(dataset) == 4 and all(demo.still and demo.length == EACH for demo in dataset.demos)
    states, source = np.concatenate([episode.states_TS for episode in dataset]), taken(recorded)
    arms = np.delete(np.arange(states.shape[1]), np.r_[10:17, -6:0])
    np.testing.assert_array_equal(states[:, arms], source[:, arms])
    moved = (states[:, CUBE] != source[:, CUBE]).any(axis=1)
    assert 0.3 < moved.mean() < 0.7
    np.testing.assert_array_equal(states[~moved], source[~moved])
    assert (states[moved, -6:] == 0).all()
    assert dataset.info["stills"] == {
        "files": ["roam.hdf5"], "rows": [80], "every": 2, "moved": 0.5, "seed": 5, "image_size": SIZE,
    }  # fmt: skip


@pytest.mark.gl
def test_images_observations_and_success_are_those_of_the_states(made: Path) -> None:
    simulation = Simulation(get_task("lift"))
    deepest = 0.0
    for episode in open_dataset(made):
        assert episode.actions_TA.shape == (EACH, 7) and not episode.actions_TA.any()
        assert episode.still and episode.attrs["category"] == "still" and "success" not in episode.attrs
        for t, state_S in enumerate(episode.states_TS):
            simulation.reset_to(state_S)
            np.testing.assert_array_equal(simulation.render(SIZE), episode.images_THWC[t])
            np.testing.assert_allclose(simulation.observe()["object"], episode.obs["object"][t], atol=1e-6)
            assert success_by_row(episode)[t] == simulation.is_success()
            deepest = min(deepest, simulation.object_contacts().min(initial=0.0))
    assert deepest >= -DEEPEST
    simulation.close()


@pytest.mark.gl
def test_a_seed_gives_the_same_stills_also_after_a_kill_at_half(
    recorded: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again.hdf5"
    whole = stills._Photographer.episode

    def killed(self: object, index: int) -> Episode:
        if index == 2:
            raise KeyboardInterrupt
        return whole(self, index)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stills._Photographer, "episode", killed)
        make_stills(config(recorded, out), progress=False)
    assert not out.exists() and len(list(parts_folder(out).iterdir())) == 2
    with pytest.raises(ResumeError, match="other settings"):
        make_stills(config(recorded, out, moved=0.4), progress=False)
    again = open_dataset(make_stills(config(recorded, out), progress=False))
    assert all(same(a, b) for a, b in zip(again, open_dataset(made), strict=True)) and len(again) == 4
    other = open_dataset(make_stills(config(recorded, tmp_path / "other.hdf5", seed=6), progress=False))
    assert not same(other[0], again[0])


@pytest.mark.gl
def test_several_files_none_moved_and_a_name_by_default(recorded: Path, tmp_path: Path) -> None:
    twice = []
    for name in ("a", "b"):
        twice.append(tmp_path / f"{name}.hdf5")
        shutil.copy(recorded, twice[-1])
    made = make_stills(StillsConfig(tuple(twice), every=9, moved=0.0, image_size=SIZE), progress=False)
    assert made == tmp_path / "a_stills.hdf5"
    dataset = open_dataset(made)
    assert dataset.lengths_N.tolist() == [EACH, EACH]  # 5 of each of 4 episodes
    states = np.concatenate([episode.states_TS for episode in dataset])
    np.testing.assert_array_equal(states, np.tile(taken(recorded, 9), (2, 1)))


@pytest.mark.gl
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ("no states", "demo_1 has no states to render from"),
        ("another model", r"demo_0 cannot be carried over.*has no joint cube_joint0"),
        ("another task", "its environment is 'Stack', the task's is 'Lift'"),
        ("elsewhere", "demo_0.*0.100 m.*stands elsewhere"),
    ],
)
def test_what_cannot_be_shown_is_refused(recorded: Path, tmp_path: Path, damage: str, error: str) -> None:
    file = tmp_path / "damaged.hdf5"
    shutil.copy(recorded, file)
    with h5py.File(file, "r+") as opened:
        data = opened["data"]
        if damage == "no states":
            del data["demo_1/states"]
        elif damage == "another model":
            xml = data["demo_0"].attrs["model_file"]
            data["demo_0"].attrs["model_file"] = xml.replace("cube_joint0", "brick_joint0")
        elif damage == "another task":
            data.attrs["env_args"] = data.attrs["env_args"].replace('"Lift"', '"Stack"')
        else:
            data["demo_0/obs/robot0_eef_pos"][...] += 0.1
    with pytest.raises(DatasetError, match=error):
        make_stills(StillsConfig((recorded, file), tmp_path / "out.hdf5", image_size=SIZE), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.hdf5"]


def test_the_object_is_put_where_it_lay_or_anywhere_about_it() -> None:
    rng = np.random.default_rng(0)
    places = np.zeros((100, 7))
    places[:, :2] = rng.uniform(-0.2, 0.1, (100, 2))
    places[:, 2] = np.r_[np.full(70, 0.82), np.linspace(0.84, 1.1, 28), 0.02, 0.02]  # two fell off the table
    places[:, 3] = 1.0
    known = lying(places)
    np.testing.assert_array_equal(known, places[:70])
    drawn = np.stack([another_place(known, rng) for _ in range(600)])
    recorded = (drawn[:, None] == known).all(axis=-1).any(axis=1)
    assert 0.42 < recorded.mean() < 0.58
    anywhere = drawn[~recorded]
    assert (anywhere[:, 2] == 0.82).all() and (anywhere[:, 4:6] == 0).all()
    assert (anywhere[:, :2] > known[:, :2].min(axis=0) - WIDER).all() and anywhere[:, :2].max() > 0.15
    np.testing.assert_allclose(np.linalg.norm(anywhere[:, 3:], axis=1), 1.0)
    assert np.ptp(np.arctan2(anywhere[:, 6], anywhere[:, 3])) > 0.9 * np.pi


def test_wrong_settings_say_what_is_right() -> None:
    with pytest.raises(InvalidArgument, match="every must be at least 1, got 0"):
        StillsConfig((Path("a"),), every=0)
    with pytest.raises(InvalidArgument, match=r"moved must be a share in \[0, 1\], got 1.5"):
        StillsConfig((Path("a"),), moved=1.5)
    with pytest.raises(InvalidArgument, match="files must name one or more datasets, got none"):
        StillsConfig(())
