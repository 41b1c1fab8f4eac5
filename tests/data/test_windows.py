"""Clips: consecutive frames with the actions between them, drawn alike everywhere, as a function of the step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hma_gym.data.cache import TokenCache
from hma_gym.data.windows import ClipBatches, ClipConfig
from hma_gym.domains import Domain
from hma_gym.errors import DatasetError, InvalidArgument

LENGTHS = [9, 5, 12, 7]


def _cache(action_dim: int = 2, state_dim: int = 1, soft: bool = True, lengths: list[int] = LENGTHS) -> TokenCache:
    """Every number tells its row: row f has tokens f, actions f + 0.1 k, agent_pos f. The last episode is for test."""
    rows = np.arange(sum(lengths))
    tokens = np.tile(rows[:, None], (1, 4))
    return TokenCache(
        tokens=np.tile(tokens[:, :, None], (1, 1, 3)).astype(np.float16) if soft else tokens.astype(np.int32),
        actions_FA=(rows[:, None] + 0.1 * np.arange(action_dim)).astype(np.float32),
        agent_pos_FP=np.repeat(rows[:, None], state_dim, axis=1).astype(np.float32),
        targets_FX=np.zeros((len(rows), 0), np.float32),
        starts_N1=np.cumsum([0, *lengths]),
        split_N=np.array([0] * (len(lengths) - 1) + [2]),
        success_N=np.zeros(len(lengths), bool),
        category_N=("held", "pushed", "held", "pushed")[: len(lengths)],
    )


def _domain(cache: TokenCache, stride: int = 1, name: str = "d") -> Domain:
    domain = cache.make_domain(name, stride=1, control_hz=10.0, image_size=(8, 8))
    return dataclasses.replace(domain, stride=stride)


def test_frames_are_consecutive_and_actions_lie_between_them() -> None:
    for stride in (1, 2):
        cache = _cache()
        batches = ClipBatches([cache], [_domain(cache, stride)], ClipConfig(batch_size=16, frames=2))
        ends = set((cache.starts_N1[1:] - 1).tolist())
        for step in range(20):
            batch = batches.batch(step)
            frame = batch["tokens"][:, :, 0, 0]
            assert batch["tokens"].shape == (16, 3, 4, 3) and batch["tokens"].dtype == torch.float32
            assert (frame[:, 1:] - frame[:, :-1] == stride).all()
            assert torch.equal(batch["agent_pos"][..., 0], frame)
            assert batch["actions"].shape == (16, 2, 2 * stride)
            for k in range(stride):  # a chunk holds the actions of the rows from one frame to the next
                torch.testing.assert_close(batch["actions"][..., 2 * k], frame[:, :-1] + k)
                torch.testing.assert_close(batch["actions"][..., 2 * k + 1], frame[:, :-1] + k + 0.1)
            inside = [not ends & set(range(int(row[0]), int(row[-1]))) for row in frame]
            assert all(inside) and float(frame.max()) < sum(LENGTHS[:3])  # never across episodes, nor a test episode


def test_stills_are_in_no_clip() -> None:
    cache = _cache(lengths=[1, 1, 9, 1])
    domain = _domain(cache)
    batches = ClipBatches([cache], [domain], ClipConfig(batch_size=64, frames=1, margin=4))
    assert set(batches.batch(0)["tokens"][:, :, 0, 0].flatten().tolist()) == set(range(2, 11))
    with pytest.raises(DatasetError, match="no train episode of domain 'd' is longer"):
        ClipBatches([_cache(lengths=[1, 1, 1, 1])], [domain], ClipConfig(frames=1))


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    cache = _cache(soft=False)
    one, same, other = (
        ClipBatches([cache], [_domain(cache)], ClipConfig(4, 2, seed=seed)).batch(7) for seed in (3, 3, 4)
    )
    assert one["tokens"].dtype == torch.int64
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["tokens"], other["tokens"])
    assert not torch.equal(
        one["tokens"], ClipBatches([cache], [_domain(cache)], ClipConfig(4, 2, 3)).batch(8)["tokens"]
    )


def test_every_clip_is_equally_likely() -> None:
    cache = _cache()
    batches = ClipBatches([cache], [_domain(cache)], ClipConfig(batch_size=50, frames=4))
    first = torch.cat([batches.batch(step)["tokens"][:, 0, 0, 0] for step in range(60)]).long()
    counts = torch.bincount(first, minlength=26)
    possible = [start + i for start, length in zip((0, 9, 14), LENGTHS, strict=False) for i in range(length - 4)]
    assert counts.nonzero()[:, 0].tolist() == possible
    wanted = 3000 / len(possible)
    assert float(((counts[possible] - wanted) ** 2 / wanted).sum()) < 33  # p < 0.001 with 13 degrees of freedom


def test_margin_evens_out_where_a_random_part_of_each_clip_is_trained_on() -> None:
    """Clips of 10 in an episode of 16 rows, of which a part of 4 from 0..6 on is trained on, as with own rollouts."""
    cache = _cache(lengths=[16, 16])
    rng = np.random.default_rng(0)
    coverage = {}
    for margin in (0, 6):
        batches = ClipBatches([cache], [_domain(cache)], ClipConfig(50, 10, margin=margin))
        first = torch.cat([batches.batch(step)["tokens"][:, 0, 0, 0] for step in range(40)]).long().numpy()
        assert first.min() == 0 and first.max() == 5
        trained = first + rng.integers(0, 7, len(first))
        coverage[margin] = np.bincount(trained, minlength=12) / len(trained)
    assert coverage[0][[0, -1]].max() < 0.03 < 0.045 < coverage[6][[0, -1]].min()
    assert coverage[6].max() / coverage[6].min() < 4 < 5 < coverage[0].max() / coverage[0].min()


def test_categories_and_domains_have_their_shares() -> None:
    cache, other = _cache(), _cache(action_dim=5, state_dim=0)
    batches = ClipBatches(
        [cache, other],
        [_domain(cache), _domain(other, name="e")],
        ClipConfig(100, 2, category_weight=(("pushed", 4.0),)),
        mixture=(3, 1),
    )
    drawn = [batches.batch(step) for step in range(20)]
    domain = torch.cat([batch["domain"] for batch in drawn])
    assert float((domain == 0).float().mean()) == pytest.approx(0.75, abs=0.04)
    first = torch.cat([batch["tokens"][:, 0, 0, 0] for batch in drawn])
    pushed = ((first >= 9) & (first < 14)).float().mean()  # 3 clips of weight 4 against 7 and 10 of weight 1
    assert float(pushed) == pytest.approx(12 / 29, abs=0.04)
    actions = torch.cat([batch["actions"] for batch in drawn])
    assert actions.shape[-1] == 5 and (actions[domain == 0][..., 2:] == 0).all()
    assert (torch.cat([batch["agent_pos"] for batch in drawn])[domain == 1] == 0).all()


def test_what_cannot_be_drawn_is_refused() -> None:
    cache = _cache()
    domain = _domain(cache)
    with pytest.raises(DatasetError, match="no train episode of domain 'd' is longer than a clip of 12"):
        ClipBatches([cache], [domain], ClipConfig(2, 12))
    with pytest.raises(DatasetError, match="has 2 dims of actions, the dataset 3"):
        ClipBatches([_cache(action_dim=3)], [domain], ClipConfig(2, 2))
    with pytest.raises(DatasetError, match="has 1 dims of agent_pos, the dataset 4"):
        ClipBatches([_cache(state_dim=4)], [domain], ClipConfig(2, 2))
    for fields in ({"batch_size": 0}, {"frames": 0}, {"margin": -1}):
        with pytest.raises(InvalidArgument, match="must be positive"):
            ClipConfig(**fields)
