"""The summary of a dataset counts what is there."""

import dataclasses

import numpy as np
import pytest

from hma_gym.data.episodes import Episode
from hma_gym.data.info import Group, InfoConfig, format_summary, info, summarise
from hma_gym.data.robomimic_hdf5 import EpisodeWriter, open_dataset


@pytest.fixture
def dataset(tmp_path):
    writer = EpisodeWriter(tmp_path / "lift.hdf5", env_args={"env_name": "Lift"}, info={"seed": 7})
    for number in range(6):
        rows = 4 + number
        actions_TA = np.full((rows, 2), 0.1 * number, np.float32)
        actions_TA[0, 1] = -0.5
        held = number < 2
        writer.append(
            Episode(
                images_THWC=np.zeros((rows, 8, 8, 3), np.uint8),
                agent_pos_TP=np.zeros((rows, 9)),
                actions_TA=actions_TA,
                states_TS=np.zeros((rows, 3)),
                rewards_T=np.zeros(rows),
                dones_T=np.zeros(rows),
                attrs={"success": held, "category": "held" if held else "pushed", "mode": "expert" if held else "push"},
            )
        )
    return open_dataset(writer.merge())


def test_the_summary_counts_what_is_there(dataset):
    summary = summarise(dataset)
    assert (summary.episodes, summary.rows) == (6, 39)
    assert (summary.length_min, summary.length_mean, summary.length_max) == (4, 6.5, 9)
    assert summary.success_rate == pytest.approx(2 / 6)
    assert summary.by["category"] == (Group("pushed", 4, 0.0), Group("held", 2, 1.0))
    assert "policy" not in summary.by
    assert summary.masks == {"train": 5, "valid": 1, "test": 0}
    assert summary.obs_shapes == {"agent_pos": (9,), "agentview_image": (8, 8, 3)}
    assert summary.action_low == pytest.approx((0.0, -0.5))
    assert summary.action_high == pytest.approx((0.5, 0.5))
    assert summary.made_by["seed"] == 7


def test_stills_are_counted_apart(dataset, tmp_path):
    writer = EpisodeWriter(tmp_path / "both.hdf5", env_args={}, info={})
    stills = dataclasses.replace(dataset[5], attrs={"category": "still", "still": True})
    for episode in (dataset[0], stills):
        writer.append(episode)
    summary = summarise(open_dataset(writer.merge()))
    assert (summary.episodes, summary.rows, summary.stills, summary.length_max) == (1, 4, 9, 4)
    assert summary.by["category"] == (Group("held", 1, 1.0),) and summary.success_rate == 1.0
    assert "stills        9 (rows that do not follow one another)" in format_summary(summary)
    only = EpisodeWriter(tmp_path / "only.hdf5", env_args={}, info={})
    only.append(stills)
    summary = summarise(open_dataset(only.merge()))
    assert (summary.episodes, summary.stills, summary.length_mean, summary.success_rate) == (0, 9, 0.0, None)
    assert "episodes      0" in format_summary(summary)


def test_the_table_is_printed(dataset, capsys):
    summary = info(InfoConfig(dataset.path))
    printed = capsys.readouterr().out
    assert printed.strip() == format_summary(summary)
    for line in ("episodes      6 (39 rows; 4 to 9 each", "33.3 % at the last row", "pushed       4 episodes"):
        assert line in printed
