"""Token caches and frame packs: what goes in comes out, grown caches equal new ones, damage is noticed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from hma_gym.data.cache import (
    TokenCache,
    build_token_cache,
    demo_of,
    episode_names,
    load_token_cache,
    read_frame_pack,
    write_frame_pack,
)
from hma_gym.data.episodes import EEF_POS, Episode
from hma_gym.data.object_pose import object_poses
from hma_gym.data.robomimic_hdf5 import EpisodeWriter, open_dataset
from hma_gym.errors import DatasetError, StorageError


def _episode(index: int, targets: bool = True) -> Episode:
    rows = 4 + index % 3
    rng = np.random.default_rng(index)
    return Episode(
        images_THWC=rng.integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8),
        agent_pos_TP=rng.normal(size=(rows, 2)).astype(np.float32),
        actions_TA=rng.uniform(-1, 3, (rows, 3)).astype(np.float32),
        states_TS=np.zeros((rows, 0)),
        rewards_T=np.zeros(rows, np.float32),
        dones_T=np.arange(rows) == rows - 1,
        obs={"object": rng.normal(size=(rows, 10))} if targets else {},
        attrs={"success": index % 2 == 0, "category": "held" if index % 2 == 0 else "pushed"},
    )


def _record(path: Path, indices: range | list[int], targets: bool = True) -> EpisodeWriter:
    writer = EpisodeWriter(path, env_args={}, info={})
    for index in indices:
        writer.write(index, _episode(index, targets))
    return writer


class _Encoder:
    """Mean colours of the four quarters; counts the episodes that it saw."""

    def __init__(self) -> None:
        self.episodes = 0

    def __call__(self, frames: Tensor) -> Tensor:
        self.episodes += 1
        return frames.float().view(-1, 2, 4, 2, 4, 3).mean(dim=(2, 4)).flatten(1, 2) / 255


def _equal(a: TokenCache, b: TokenCache) -> bool:
    fields = [f.name for f in dataclasses.fields(TokenCache)]
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in fields)


def test_episodes_that_differ_in_what_they_tell_are_refused(tmp_path: Path) -> None:
    writer = _record(tmp_path / "d.hdf5", range(2))
    writer.write(2, _episode(2, targets=False))
    writer.merge()
    with pytest.raises(DatasetError, match="targets of 'demo_2' has"):
        build_token_cache(open_dataset(tmp_path / "d.hdf5"), _Encoder(), progress=False)


def test_rows_are_the_episodes_and_survive_the_disk(tmp_path: Path) -> None:
    _record(tmp_path / "d.hdf5", range(13)).merge()
    dataset = open_dataset(tmp_path / "d.hdf5")
    cache = build_token_cache(dataset, _Encoder(), domain="d", tokenizer="abc", progress=False)
    assert _equal(load_token_cache(cache.save(tmp_path / "deep" / "d.h5")), cache)
    assert len(cache) == 13 and cache.tokens.dtype == np.float16
    assert cache.episodes("test").tolist() == [11] and cache.episodes("valid").tolist() == [5]
    for n in (0, 5, 12):
        episode, rows = dataset[n], cache.rows(n)
        assert np.array_equal(cache.actions_FA[rows], episode.actions_TA)
        assert np.array_equal(cache.agent_pos_FP[rows], episode.agent_pos_TP)
        assert np.array_equal(cache.targets_FX[rows], episode.obs["object"][:, :3].astype(np.float32))
        assert cache.success_N[n] == (n % 2 == 0)
        wanted = _Encoder()(torch.from_numpy(episode.images_THWC)).numpy()
        assert np.allclose(cache.tokens[rows], wanted, atol=1e-3)
    codes = build_token_cache(dataset, lambda x: x[:, :2, :2, 0].flatten(1).long(), progress=False)
    assert codes.tokens.dtype == np.int32 and codes.tokens.shape[1:] == (4,)


def test_growth_encodes_only_what_is_new_and_equals_a_new_cache(tmp_path: Path) -> None:
    """Two workers record: an episode with a lower index comes after one with a higher."""
    path = tmp_path / "d.hdf5"
    writer = _record(path, [0, 1, 3, 5])
    first = build_token_cache(open_dataset(path), _Encoder(), progress=False)
    for index in (2, 4, 6):
        writer.write(index, _episode(index))
    dataset, encoder = open_dataset(path), _Encoder()
    grown = build_token_cache(dataset, encoder, previous=first, progress=False)
    assert encoder.episodes == 3
    assert _equal(grown, build_token_cache(dataset, _Encoder(), progress=False))
    assert grown.name_N == tuple(f"demo_{i}" for i in range(7))
    unknown = dataclasses.replace(first, name_N=())  # a cache that does not know names is not trusted to be a prefix
    assert _equal(build_token_cache(dataset, encoder, previous=unknown, progress=False), grown)
    assert encoder.episodes == 3 + 7


def _stills(index: int) -> Episode:
    """Rows that do not follow one another; in every third the task is done."""
    plain = _episode(index)
    success_T = np.arange(len(plain)) % 3 == 0
    return dataclasses.replace(
        plain,
        actions_TA=np.zeros_like(plain.actions_TA),
        rewards_T=np.roll(success_T, -1),
        attrs={"category": "still", "still": True},
    )


def test_each_still_is_an_episode_of_its_own(tmp_path: Path) -> None:
    writer = _record(tmp_path / "d.hdf5", [0, 5])
    writer.write(1, _stills(1))
    writer.write(2, _stills(2))
    dataset = open_dataset(tmp_path / "d.hdf5")
    encoder = _Encoder()
    cache = build_token_cache(dataset, encoder, progress=False)
    names = ["demo_0", *(f"demo_1[{t}]" for t in range(5)), *(f"demo_2[{t}]" for t in range(6)), "demo_5"]
    assert list(cache.name_N) == names and episode_names(dataset) == cache.name_N
    assert [demo_of(name) for name in names[:2]] == ["demo_0", "demo_1"]
    assert np.diff(cache.starts_N1).tolist() == [4] + [1] * 11 + [6]
    assert cache.category_N == ("held", *("still",) * 11, "pushed")
    done = [True, False, False, True, False, True, False, False, True, False, False]
    assert cache.success_N.tolist() == [True, *done, False]
    assert cache.episodes("valid").tolist() == [12] and cache.moving("train").tolist() == [0]
    assert np.array_equal(cache.agent_pos_FP[cache.rows(3)][0], dataset[1].agent_pos_TP[2])
    writer.write(3, _stills(3))
    writer.write(6, _episode(6))
    grown = open_dataset(tmp_path / "d.hdf5")
    new = build_token_cache(grown, _Encoder(), progress=False)
    encoder.episodes = 0
    assert _equal(build_token_cache(grown, encoder, previous=cache, progress=False), new) and encoder.episodes == 2
    assert _equal(load_token_cache(new.save(tmp_path / "d.h5")), new)


def test_stills_tell_nothing_of_motion(tmp_path: Path) -> None:
    _record(tmp_path / "plain.hdf5", range(4)).merge()
    writer = _record(tmp_path / "both.hdf5", range(4))
    for index in range(12, 240):
        writer.write(index, _stills(index))
    plain, both = (
        build_token_cache(open_dataset(tmp_path / f"{name}.hdf5"), _Encoder(), progress=False)
        for name in ("plain", "both")
    )
    settings: dict[str, Any] = {"stride": 1, "control_hz": 10.0, "image_size": (8, 8)}
    a, b = plain.make_domain("d", **settings), both.make_domain("d", **settings)
    assert (a.action_mean, a.action_std, a.delta_std) == (b.action_mean, b.action_std, b.delta_std)
    first = dataclasses.replace(  # stills before everything else
        both,
        starts_N1=np.r_[0, np.cumsum(np.r_[np.ones(300, int), np.diff(plain.starts_N1)])],
        tokens=np.concatenate((both.tokens[-300:], plain.tokens)),
        split_N=np.zeros(304, int),
    )
    assert first.change_scale() == pytest.approx(plain.change_scale()) and plain.change_scale() > 0


def test_domain_statistics_are_of_training_episodes(tmp_path: Path) -> None:
    _record(tmp_path / "d.hdf5", range(12)).merge()
    dataset = open_dataset(tmp_path / "d.hdf5")
    cache = build_token_cache(dataset, _Encoder(), progress=False)
    training = [dataset[n] for n in dataset.split("train")]
    for stride in (1, 2):
        domain = cache.make_domain("d", stride=stride, control_hz=10.0, image_size=(8, 8))
        assert (domain.action_dim, domain.state_dim, domain.target_dim, domain.stride) == (3, 2, 3, stride)
        changes = np.concatenate([e.agent_pos_TP[stride:] - e.agent_pos_TP[:-stride] for e in training])
        assert np.allclose(domain.delta_std, changes.std(axis=0), rtol=1e-4)
    actions = np.concatenate([e.actions_TA for e in training])
    assert np.allclose(domain.action_mean, actions.mean(axis=0), rtol=1e-4)
    assert domain.action_low == (-1.0,) * 3  # nothing below -1 in the data
    assert np.allclose(domain.action_high, actions.max(axis=0))
    squares = [np.diff(cache.tokens[cache.rows(n)].astype(np.float32), axis=0) ** 2 for n in dataset.split("train")]
    assert cache.change_scale() == pytest.approx(float(np.sqrt(np.concatenate(squares).mean())), rel=1e-5)
    with pytest.raises(DatasetError, match="longer than a stride of 9"):
        cache.make_domain("d", stride=9, control_hz=10.0, image_size=(8, 8))


def test_data_without_targets_has_none(tmp_path: Path) -> None:
    _record(tmp_path / "d.hdf5", range(2), targets=False).merge()
    cache = build_token_cache(open_dataset(tmp_path / "d.hdf5"), _Encoder(), progress=False)
    assert cache.targets_FX.shape[1] == 0
    assert cache.make_domain("d", stride=1, control_hz=10.0, image_size=(8, 8)).target_dim == 0


def _handled(index: int) -> Episode:
    """A hand, and a cube that another quarter of a turn has brought about in each episode."""
    plain = _episode(index)
    rng, rows = np.random.default_rng(index), len(plain)
    yaw = 0.1 + index * np.pi / 2 + 0.02 * np.arange(rows)
    nothing = np.zeros(rows)
    cube = np.stack((*rng.normal(size=(3, rows)), nothing, nothing, np.sin(yaw / 2), np.cos(yaw / 2)), axis=1)
    hand = rng.normal(size=(rows, 9)).astype(np.float32)
    return dataclasses.replace(plain, agent_pos_TP=hand, obs={"object": cube, EEF_POS: hand[:, :3]})


def test_an_objects_pose_is_kept_and_described_alike_when_it_is_used(tmp_path: Path) -> None:
    writer = EpisodeWriter(tmp_path / "d.hdf5", env_args={}, info={})
    for index in range(8):
        writer.write(index, _handled(index))
    cache = build_token_cache(open_dataset(writer.merge()), _Encoder(), progress=False)
    cache = load_token_cache(cache.save(tmp_path / "d.h5"))
    assert cache.has_object_pose()
    for n in range(8):
        np.testing.assert_array_equal(cache.targets_FX[cache.rows(n)], object_poses(_handled(n).obs["object"]))
    alike = cache.turned_alike(4)
    for n in range(8):
        first = alike.targets_FX[alike.rows(n)][0]
        np.testing.assert_allclose(np.arctan2(first[4], first[3]), 0.1, atol=1e-5)
        np.testing.assert_allclose(np.arctan2(first[7], first[6]), 0.1 + np.pi / 2, atol=1e-5)
    np.testing.assert_array_equal(alike.targets_FX[:, :3], cache.targets_FX[:, :3])
    assert alike.tokens is cache.tokens and cache.turned_alike(0) is cache
    assert _equal(cache.turned_alike(1), cache)


def test_a_domain_has_an_object_where_the_targets_are_its_pose(tmp_path: Path) -> None:
    writer = EpisodeWriter(tmp_path / "d.hdf5", env_args={}, info={})
    for index in range(4):
        writer.write(index, _handled(index))
    cache = build_token_cache(open_dataset(writer.merge()), _Encoder(), progress=False)
    settings: dict[str, Any] = {"stride": 1, "control_hz": 10.0, "image_size": (8, 8)}
    domain = cache.make_domain("d", **settings, object_turns=4)
    assert (domain.target_dim, domain.object_turns) == (9, 4)
    assert np.allclose(domain.target_mean, cache.targets_FX.mean(axis=0), atol=1e-5)
    assert cache.make_domain("d", **settings).object_turns == 0
    _record(tmp_path / "p.hdf5", range(4)).merge()  # positions only
    plain = build_token_cache(open_dataset(tmp_path / "p.hdf5"), _Encoder(), progress=False)
    assert not plain.has_object_pose() and plain.turned_alike(4) is plain
    domain = plain.make_domain("d", **settings, object_turns=4)
    assert (domain.target_dim, domain.object_turns) == (3, 0)


def test_a_failed_write_leaves_the_old_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.hdf5"
    writer = _record(path, range(2))
    old = build_token_cache(open_dataset(path), _Encoder(), progress=False)
    old.save(tmp_path / "d.h5")
    writer.write(2, _episode(2))
    new = build_token_cache(open_dataset(path), _Encoder(), progress=False)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(StorageError, match="disk is full"):
        new.save(tmp_path / "d.h5")
    assert _equal(load_token_cache(tmp_path / "d.h5"), old)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign", "lacking"])
def test_damaged_caches_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "d.h5"
    _record(tmp_path / "d.hdf5", range(3))
    build_token_cache(open_dataset(tmp_path / "d.hdf5"), _Encoder(), progress=False).save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-700])
    elif damage == "text":
        path.write_text("tokens")
    elif damage == "foreign":
        with h5py.File(path, "w") as file:
            file["tokens"] = np.zeros(3)
    else:
        with h5py.File(path, "a") as file:
            del file["starts"]
    with pytest.raises(DatasetError, match="token cache"):
        load_token_cache(path)


def test_frame_pack_round_trip(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    frames = [
        np.stack([np.stack((np.roll(np.tile(ramp, (32, 1)), t, 0),) * 3, axis=-1) for t in range(rows)])
        for rows in (3, 1, 2)
    ]
    path = write_frame_pack(tmp_path / "f.h5", frames)
    back = read_frame_pack(path)
    assert [b.shape for b in back] == [f.shape for f in frames]
    assert all(b.dtype == np.uint8 and np.abs(b.astype(int) - f).max() <= 12 for b, f in zip(back, frames, strict=True))
    assert path.stat().st_size < 0.7 * sum(f.nbytes for f in frames)
    assert not (tmp_path / "f.h5.tmp").exists()


def test_damaged_frame_packs_are_refused(tmp_path: Path) -> None:
    path = write_frame_pack(tmp_path / "f.h5", [np.zeros((2, 8, 8, 3), np.uint8)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DatasetError, match="frame pack"):
        read_frame_pack(path)
    _record(tmp_path / "d.hdf5", range(1)).merge()
    with pytest.raises(DatasetError, match="is no frame pack"):
        read_frame_pack(tmp_path / "d.hdf5")
