"""The contact sheet and the film show the chosen episodes, their actions and their outcome."""

import imageio.v3 as imageio
import numpy as np
import pytest
from imageio_ffmpeg import count_frames_and_secs

from hma_gym.collection.view import ViewConfig, choose, contact_sheet, film, outcome, view
from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter, open_dataset
from hma_gym.errors import DatasetError, InvalidArgument, StorageError

GREEN = (38, 135, 78)


def make_episode(rows, **attrs):
    """A grey episode whose first action dim is +1 and whose last row shows success where the attributes say so."""
    actions_TA = np.zeros((rows, 7), np.float32)
    actions_TA[:, 0] = 1.0
    return Episode(
        images_THWC=np.full((rows, 16, 16, 3), 128, np.uint8),
        agent_pos_TP=np.zeros((rows, 9)),
        actions_TA=actions_TA,
        states_TS=np.zeros((rows, 1)),
        rewards_T=(np.arange(rows) >= rows - 2) * float(attrs.get("success", False)),
        dones_T=np.zeros(rows),
        attrs=attrs,
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    writer = EpisodeWriter(tmp_path_factory.mktemp("view") / "lift.hdf5", env_args={}, info={})
    for number in range(9):
        held = number % 3 == 0
        writer.append(
            make_episode(
                5 + number % 2,
                success=held,
                success_ever=held,
                category="held" if held else "near_miss",
                mode="expert",
                competence=0.5,
                policy="scripted",
            )
        )
    return writer.merge()


def test_both_pictures_are_made(recorded, tmp_path):
    sheet_path, film_path = view(ViewConfig(recorded, out=tmp_path / "pictures", count=4, frames=3, tile=40))
    assert imageio.imread(sheet_path).ndim == 3
    frames, seconds = count_frames_and_secs(str(film_path))
    assert (frames, seconds) == (6 + 10, 1.6)  # the longest episode, then one second of rest


def test_a_shorter_episode_rests_on_its_last_row():
    first, last = film(["demo_0", "demo_1"], [make_episode(2), make_episode(5)], tile=32, hold=0)[::4]
    assert first.shape == last.shape and not np.array_equal(first, last)
    assert len(film(["demo_0"], [make_episode(3)], tile=32, hold=4)) == 7


def test_by_default_the_pictures_lie_beside_the_file(recorded):
    sheet_path, _ = view(ViewConfig(recorded, demos=(0,), frames=2, tile=32))
    assert sheet_path == recorded.with_name("lift_view") / "contact_sheet.png"


def test_success_has_a_green_border_and_actions_are_drawn(recorded):
    frames, tile = 3, 64
    episodes = [open_dataset(recorded)[0]]
    sheet_HWC = np.asarray(contact_sheet(["demo_0"], episodes, frames=frames, tile=tile))
    green_HW = (sheet_HWC == GREEN).all(-1)
    right_third = green_HW[:, -(tile + 10) :]
    assert right_third.sum() > 2 * tile
    assert green_HW[:, 168 : 168 + 2 * tile].sum() == 0
    blue = (52, 106, 176)
    assert (sheet_HWC == blue).all(-1).sum() > 20 * frames


def test_outcomes_are_told_apart():
    assert outcome(make_episode(2, success=True, success_ever=True))[0] == "success"
    assert outcome(make_episode(2, success=False, success_ever=True))[0] == "dropped"
    assert outcome(make_episode(2))[0] == "failure"


def test_every_category_gets_its_share(recorded):
    dataset = open_dataset(recorded)
    chosen = choose(dataset, (), 6)
    categories = dataset.column("category")
    assert sorted(categories[position] for position in chosen) == ["held"] * 3 + ["near_miss"] * 3
    assert len(set(chosen)) == 6
    assert sorted(choose(dataset, (), 100)) == list(range(9))
    assert choose(dataset, (7, 2), 1) == [7, 2]


def test_a_demo_that_is_not_there_is_named(recorded):
    with pytest.raises(InvalidArgument, match=r"0 to 8.*\[42\]"):
        view(ViewConfig(recorded, demos=(1, 42)))


def test_an_unwritable_folder_is_a_storage_error(recorded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        view(ViewConfig(recorded, out=tmp_path / "file" / "x", demos=(0,), frames=2, tile=32))


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(DatasetError, match="no dataset"):
        view(ViewConfig(tmp_path / "nowhere.hdf5"))


def test_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="frames=1"):
        ViewConfig(tmp_path / "x", frames=1)
