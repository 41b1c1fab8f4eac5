"""The first stage of the dynamics recipe: windows for the body, and how it resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from hma_gym.data.cache import TokenCache, join_caches
from hma_gym.domains import Domain
from hma_gym.dynamics.mar import FlowHeadConfig
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.errors import DatasetError
from hma_gym.nn.transformer import TrunkConfig
from hma_gym.training.recipes.body import (
    AT_OBJECT,
    AT_START,
    LYING,
    NEARNESS,
    BodyBatches,
    BodyValidation,
    coasted_to_the_end,
    train_bodies,
)

ROWS = 20


def _cache(episodes: int = 10, rows: int = ROWS, tokenizer: str = "x") -> TokenCache:
    """agent_pos counts the actions up, and says in its second dim which episode and row it is."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (episodes, rows, 2)).astype(np.float32)
    place = np.concatenate([np.zeros((episodes, 1)), np.cumsum(actions[:, :-1, 0], axis=1)], axis=1)
    label = np.arange(episodes * rows).reshape(episodes, rows)
    return TokenCache(
        tokens=rng.normal(size=(episodes * rows, 16, 3)).astype(np.float16),
        actions_FA=actions.reshape(-1, 2),
        agent_pos_FP=np.stack((place, label), axis=-1).reshape(-1, 2).astype(np.float32),
        targets_FX=np.zeros((episodes * rows, 0), np.float32),
        starts_N1=np.arange(episodes + 1) * rows,
        split_N=np.array([0] * (episodes - 2) + [1, 2]),
        success_N=np.zeros(episodes, bool),
        category_N=("",) * episodes,
        name_N=tuple(f"demo_{n}" for n in range(episodes)),
        domain="arm",
        tokenizer=tokenizer,
    )


def _handling_cache(near: slice = slice(0, 0), rows: int = ROWS) -> TokenCache:
    """The same with a hand and an object, which says the row in its height; they are near each other in some rows."""
    plain = _cache(rows=rows)
    count = len(plain.agent_pos_FP)
    agent_pos, targets = np.zeros((count, 9), np.float32), np.zeros((count, 9), np.float32)
    agent_pos[:, :2] = plain.agent_pos_FP
    agent_pos[:, 6] = 1.0  # quaternion
    targets[:, 2] = np.arange(count)
    agent_pos[:, 2] = targets[:, 2] + 1.0
    targets[:, :2] = agent_pos[:, :2]
    targets[:, 3] = targets[:, 7] = 1.0
    for start in plain.starts_N1[:-1]:
        agent_pos[start:][near, 2] -= 0.99
    return dataclasses.replace(plain, agent_pos_FP=agent_pos, targets_FX=targets)


def _dynamics(cache: TokenCache, stride: int = 1, turns: int = 0) -> Dynamics:
    own: Domain = cache.make_domain("arm", stride=stride, control_hz=10.0, image_size=(32, 32), object_turns=turns)
    torch.manual_seed(0)
    trunk = TrunkConfig(layers=1, width=16, heads=2, window=4)
    return Dynamics(DynamicsConfig(trunk, FlowHeadConfig((4, 4), channels=3, patch=2)), [own])


@pytest.mark.parametrize(("stride", "step"), [(1, 0), (1, 6), (3, 0), (3, 6)])
def test_windows_follow_their_episode_and_say_where_they_are_at_rest(stride: int, step: int) -> None:
    cache = _cache()
    batches = BodyBatches(cache, cache, _dynamics(cache, stride).adapter(0).body, 40, 5, steps=10, seed=0)
    batch = batches.batch(step)
    label = batch["agent_pos"][..., 1].numpy().astype(int)
    assert (np.diff(label, axis=1) == stride).all() and (label // ROWS == label[:, :1] // ROWS).all()
    assert (label[:, 0] // ROWS < 8).all()  # training episodes only
    assert ((label[:, 0] % ROWS == 0) == batch["at_rest"].numpy()).all()
    if step:  # a long window, and most begin at rest
        assert len(label) == 40 and int(batch["warm"]) == 0 and 0.4 < batch["at_rest"].float().mean() < 0.9
    else:
        assert len(label) == 320 and label.shape[1] - 1 - int(batch["warm"]) == 3
    own = batches.body.domain
    raw = batch["actions"] * torch.tensor(own.action_std).repeat(stride) + torch.tensor(own.action_mean).repeat(stride)
    moved = raw.unflatten(-1, (stride, 2))[..., 0].sum(dim=-1)
    torch.testing.assert_close(batch["agent_pos"][:, 1:, 0] - batch["agent_pos"][:, :-1, 0], moved, atol=1e-4, rtol=0)
    shown = batch["poses"][:, 1].numpy().astype(int)
    np.testing.assert_array_equal(batch["tokens"].numpy(), cache.tokens[shown].astype(np.float32))


def test_windows_are_short_then_grow_and_are_a_function_of_the_step() -> None:
    cache = _cache()
    batches = BodyBatches(cache, cache, _dynamics(cache).adapter(0).body, 4, 2, steps=300, seed=0)
    lengths = [batches.transitions(step) for step in range(300)]
    assert lengths[:180] == [6] * 180 and lengths[180] == 4  # 3 of these 6 are shown
    assert lengths[260:] == [ROWS - 1] * 40 and lengths[180:] == sorted(lengths[180:])
    for name, value in batches.batch(7).items():
        assert torch.equal(value, batches.batch(7)[name])


def _with_stills(cache: TokenCache, count: int = 30) -> TokenCache:
    """Its first rows once more as stills, some of them for validation."""
    stills = dataclasses.replace(
        cache,
        **{
            name: getattr(cache, name)[:count] + np.float32(1000)
            for name in ("tokens", "actions_FA", "agent_pos_FP", "targets_FX")
        },
        starts_N1=np.arange(count + 1),
        split_N=np.arange(count) % 2,
        success_N=np.zeros(count, bool),
        category_N=("still",) * count,
        name_N=tuple(f"demo_0[{n}]" for n in range(count)),
    )
    return join_caches([stills, cache])


@pytest.mark.parametrize("step", [0, 6])
def test_stills_are_drawn_alone_and_in_no_window(step: int) -> None:
    plain = _handling_cache(near=slice(0, ROWS))
    both = _with_stills(plain)
    body = _dynamics(plain, turns=4).adapter(0).body
    batches = BodyBatches(both, both, body, 40, 200, steps=10, seed=0)
    assert batches.room[:15].tolist() == [0] * 15
    assert batches.longest == BodyBatches(plain, plain, body, 40, 200, steps=10, seed=0).longest
    batch = batches.batch(step)
    assert (batch["agent_pos"][..., 1] < 1000).all() and (np.diff(batch["agent_pos"][..., 1], axis=1) == 1).all()
    first = int(AT_START * 200)
    assert (batch["poses"][:first, 1] < 1000).all() and (batch["poses"][first:, 1] >= 1000).any()


def test_validation_is_of_episodes_that_go_on(tmp_path: Path) -> None:
    plain = _handling_cache()
    only_stills = dataclasses.replace(plain, split_N=np.zeros(10, int))
    both = _with_stills(only_stills)
    model = _dynamics(both, turns=4)
    (result,) = train_bodies(model, [both], tmp_path, 2, windows=4, frames=8)
    assert result.finished


@pytest.mark.parametrize(("stride", "step"), [(1, 0), (3, 0), (1, 6)])
def test_windows_of_the_object_are_those_of_the_hand(stride: int, step: int) -> None:
    cache = _handling_cache()
    body = _dynamics(cache, stride, turns=4).adapter(0).body
    batch = BodyBatches(cache, cache, body, 40, 5, steps=10, seed=0).batch(step)
    assert batch["targets"].shape == (*batch["agent_pos"].shape[:2], 9)
    assert torch.equal(batch["targets"][..., 2], batch["agent_pos"][..., 1])  # both say the row
    assert torch.equal(batch["places"][:, 2], batch["poses"][:, 1])
    without = BodyBatches(cache, cache, _dynamics(cache, stride).adapter(0).body, 40, 5, steps=10, seed=0).batch(step)
    assert without["targets"].shape[-1] == without["places"].shape[-1] == 0
    assert torch.equal(without["agent_pos"], batch["agent_pos"])  # nothing is near: nowhere to look more often


@pytest.mark.parametrize(("stride", "near"), [(1, slice(15, 17)), (2, slice(24, 28))])
def test_many_short_windows_are_where_the_hand_is_at_the_object(stride: int, near: slice) -> None:
    cache = _handling_cache(near, rows=ROWS * stride)
    body = _dynamics(cache, stride, turns=4).adapter(0).body
    warm = body.config.history
    batches = BodyBatches(cache, cache, body, 40, 5, steps=10, seed=0)
    batch = batches.batch(0)
    away = (batch["agent_pos"] - batch["targets"])[..., :3].norm(dim=-1)
    label = batch["agent_pos"][..., 1].numpy().astype(int)
    assert (np.diff(label, axis=1) == stride).all()
    rows = ROWS * stride
    assert (label // rows == label[:, :1] // rows).all() and (label[:, 0] // rows < 8).all()
    share = float((away[:, warm] < NEARNESS).float().mean())  # when the first foretold step is taken
    assert AT_OBJECT - 0.1 < share < AT_OBJECT + 0.2
    late = batches.batch(6)  # long windows are not chosen so
    away = (late["agent_pos"] - late["targets"])[..., :3].norm(dim=-1)
    assert float((away[:, warm] < NEARNESS).float().mean()) < 0.3


def test_validation_tells_how_well_the_object_is_foretold_and_seen() -> None:
    cache = _handling_cache()
    body = _dynamics(cache, turns=4).adapter(0).body
    batches = BodyBatches(cache, cache, body, 12, 6, steps=10, seed=0, split="valid")
    torch.manual_seed(0)
    for parameter in body.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    with torch.no_grad():
        scores = BodyValidation(batches)(body, 10)
        batch = batches.batch(10)
        seen = body.sighted(batch["tokens"], batch["poses"], None)
        rows = batch["at_rest"]
        end = coasted_to_the_end(body, batch["agent_pos"][rows, 0], batch["targets"][rows, 0], batch["actions"][rows])
    away = (seen - batch["places"])[:, :3].norm(dim=-1).mean()
    assert scores["valid_sight"] == pytest.approx(float(away), rel=1e-4)
    away = (end.targets - batch["targets"][rows, -1])[:, :3].norm(dim=-1).mean()
    assert scores["valid_object"] == pytest.approx(float(away), rel=1e-4)
    plain = _cache()
    body = _dynamics(plain).adapter(0).body
    with torch.no_grad():
        scores = BodyValidation(BodyBatches(plain, plain, body, 12, 6, steps=10, seed=0))(body, 10)
    assert not {"valid_object", "valid_sight"} & scores.keys()


def test_first_frames_are_shown_more_often_for_a_rollout_begins_with_one() -> None:
    cache = _handling_cache()
    batch = BodyBatches(cache, cache, _dynamics(cache, turns=4).adapter(0).body, 4, 400, steps=10, seed=0).batch(0)
    label = batch["poses"][:, 1].numpy().astype(int)
    share = float((label % ROWS == 0).mean())
    assert AT_START < share < AT_START + 0.12  # and 1 of 20 by chance
    assert (label // ROWS < 8).all()


def test_a_body_with_an_object_is_trained_and_scored(tmp_path: Path) -> None:
    cache = _handling_cache()
    dynamics = _dynamics(cache, turns=4)
    before = {name: value.clone() for name, value in dynamics.adapter(0).body.state_dict().items()}
    result = train_bodies(dynamics, [cache], tmp_path, 8, windows=4, frames=8)[-1]
    assert result.finished
    heights = np.arange(8 * ROWS)  # of the training episodes
    assert float(dynamics.adapter(0).body.coast.floor) == pytest.approx(np.quantile(heights, LYING))  # type: ignore[union-attr]
    assert {"valid_coast", "valid_hand", "valid_object", "valid_look", "valid_sight"} <= result.evaluation.keys()
    after = dynamics.adapter(0).body.state_dict()
    for part in ("coast.", "look.", "sight."):
        assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(part)), part


def test_episodes_without_pictures_teach_how_things_move_and_only_that(tmp_path: Path) -> None:
    cache = _handling_cache()
    more = dataclasses.replace(cache.without_tokens(), agent_pos_FP=cache.agent_pos_FP + np.float32(1000.0))
    motions = join_caches([cache.without_tokens(), more])
    dynamics = _dynamics(cache, turns=4)
    body = dynamics.adapter(0).body
    batch = BodyBatches(motions, cache, body, 200, 400, steps=10, seed=0).batch(0)
    share = float((batch["agent_pos"][..., 0] > 900).float().mean())
    assert 0.2 < share < 0.8
    label = batch["poses"][:, 1].numpy().astype(int)
    assert label.max() < len(cache.tokens)
    np.testing.assert_array_equal(batch["tokens"].numpy(), cache.tokens[label].astype(np.float32))
    result = train_bodies(dynamics, [cache], tmp_path, 4, motions=[motions], windows=4, frames=8)[-1]
    assert result.finished and float(body.get_buffer("pose_high")[0]) > 900


def test_episodes_shorter_than_a_stride_are_refused() -> None:
    cache = _cache(rows=4)
    body = _dynamics(_cache(), stride=5).adapter(0).body
    with pytest.raises(DatasetError, match="longer than its stride of 5"):
        BodyBatches(cache, cache, body, 4, 2, steps=10, seed=0)


def test_training_improves_resumes_where_it_stopped_and_is_not_repeated(tmp_path: Path) -> None:
    cache = _cache()
    one, two = _dynamics(cache), _dynamics(cache)
    whole = train_bodies(one, [cache], tmp_path / "whole", 60, windows=8, frames=8)[-1]
    assert whole.finished and whole.evaluation["valid_look"] < 1.5
    first = train_bodies(two, [cache], tmp_path / "parts", 60, windows=8, frames=8, max_minutes=1e-6)[-1]
    assert not first.finished and first.step < 60
    again = train_bodies(_dynamics(cache), [cache], tmp_path / "parts", 60, windows=8, frames=8)[-1]
    assert again.finished
    third = _dynamics(cache)
    assert train_bodies(third, [cache], tmp_path / "parts", 60, windows=8, frames=8)[-1].step == 60
    for name, value in one.adapter(0).body.state_dict().items():
        assert torch.equal(value, third.adapter(0).body.state_dict()[name]), name


def test_caches_of_one_domain_are_joined() -> None:
    one, two = _cache(), _cache(episodes=3)
    joined = join_caches([one, two])
    assert len(joined) == 13 and joined.rows(11) == slice(220, 240)
    np.testing.assert_array_equal(joined.tokens[joined.rows(11)], two.tokens[two.rows(1)])
    assert list(joined.episodes("test")) == [9, 12] and len(set(joined.name_N)) == 13
    with pytest.raises(DatasetError, match="different tokenizers"):
        join_caches([one, _cache(tokenizer="y")])
    with pytest.raises(DatasetError, match="must be alike"):
        join_caches([one, dataclasses.replace(two, targets_FX=np.zeros((60, 3), np.float32))])
