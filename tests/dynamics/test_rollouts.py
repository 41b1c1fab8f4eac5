"""Rollouts: the cache is exact, state is explicit, randomness belongs to a row, domains share a batch."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor
from toy_dynamics import TRUNK, batch, begin, domain, handling, model, rollout, same, tokens

from hma_gym.domains import Domain
from hma_gym.dynamics.body import Body
from hma_gym.dynamics.masking import masked_after
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.dynamics.rollout import RolloutState
from hma_gym.errors import CheckpointError, EnvironmentState, InvalidAction, InvalidArgument, UnknownName

KINDS = ["soft", "vq"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NEAR = {"rtol": 1e-3, "atol": 2e-4}  # millimetres are told by fine waves, which magnify what is rounded
FRAMES = 9  # more than two windows
TWO = (domain("small", actions=2, state=2, targets=1), domain("large", actions=14, state=0, targets=0))
MIXED = (handling(), domain("small", actions=2, state=2, targets=1))


def _played(dynamics: Dynamics, clip: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rollout under the clip's actions: tokens (B, T + 1, S...), agent_pos (B, T + 1, P), the object's pose
    (B, T + 1, O) and features (B, T, D)."""
    state = begin(dynamics, clip)
    shown, pos, things, features = [state.tokens], [state.agent_pos_BP], [state.targets_BO], []
    for after, out in rollout(dynamics, state, clip["actions"]):
        shown.append(out.tokens)
        pos.append(out.agent_pos_BP)
        things.append(after.targets_BO)
        features.append(out.features_BD)
    return torch.stack(shown, 1), torch.stack(pos, 1), torch.stack(things, 1), torch.stack(features, 1)


@pytest.mark.parametrize("domains", [(domain(),), TWO, (handling(),), MIXED], ids=["one", "two", "object", "mixed"])
@pytest.mark.parametrize("modulation", ["adaln", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_shifted_rollout_equals_one_uncached_pass(kind: str, modulation: str, domains: tuple) -> None:  # type: ignore[type-arg]
    trunk = dataclasses.replace(TRUNK, modulation=modulation)  # type: ignore[arg-type]
    _compare_with_one_pass(kind, model(kind, *domains, trunk=trunk), domains)


def test_without_corrections_a_frame_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamics, drawn = model("soft", *MIXED), []
    for index, owner in enumerate(dynamics.domains):
        dynamics.set_corrected(index, torch.zeros(owner.state_dim))
    twin = model("soft", *MIXED, seed=1)
    assert twin.adapter(0).corrects
    twin.load_state_dict(dynamics.state_dict())
    assert not twin.adapter(0).corrects and not twin.adapter(1).corrects
    _compare_with_one_pass("soft", twin, MIXED)
    clip = batch("soft", twin, 2, 1)
    state, draw = begin(twin, clip), Body.drawn
    monkeypatch.setattr(Body, "drawn", lambda self, *poses: drawn.append(1) or draw(self, *poses))
    twin.step(state, clip["actions"][:, 0])
    assert len(drawn) == 2  # one of each domain


def _compare_with_one_pass(kind: str, dynamics: Dynamics, domains: tuple) -> None:  # type: ignore[type-arg]
    clip = batch(kind, dynamics, 3, FRAMES)
    shown, pos, things, features = _played(dynamics, clip)
    assert things.shape[-1] == (9 if kind == "soft" and any(owner.object_turns for owner in domains) else 0)
    columns = dynamics.clip_features(
        dynamics.head.blank(shown[:, 1:]),
        shown[:, :-1],
        torch.ones(3, FRAMES, dynamics.head.positions, dtype=torch.bool),
        dynamics.normalise_actions(clip["actions"], clip["domain"]),
        torch.ones(3, FRAMES, dtype=torch.bool),
        pos[:, :-1],
        things[:, :-1],
        clip["domain"],
        torch.ones(3, dtype=torch.bool),
    )
    torch.testing.assert_close(features, columns.pooled_BTD, **(NEAR if domains[0].object_turns else CLOSE))


@pytest.mark.parametrize(
    ("kind", "positions", "frames", "owner"),
    [("soft", "rotary", 9, domain()), ("soft", "rotary", 9, handling()), ("vq", "learned", 3, domain())],
    ids=["soft", "object", "vq"],
)
def test_in_place_rollout_equals_uncached_passes(kind: str, positions: str, frames: int, owner: Domain) -> None:
    """Each frame anew: clean columns of all frames so far (with their own agent_pos), then the masked one.

    With learned positions inside the window only, as the published weights were trained.
    """
    trunk = dataclasses.replace(TRUNK, positions=positions, modulation="residual")  # type: ignore[arg-type]
    dynamics = model(kind, owner, trunk=trunk, conditioning="in_place", action_tokens=2)
    clip = batch(kind, dynamics, 2, frames)
    shown, pos, things, features = _played(dynamics, clip)
    actions = dynamics.normalise_actions(clip["actions"], clip["domain"])
    actions = torch.cat((torch.zeros_like(actions[:, :1]), actions), dim=1)
    for t in range(1, frames + 1):
        masked = torch.zeros(2, t + 1, dynamics.head.positions, dtype=torch.bool)
        masked[:, t] = True
        given = torch.ones(2, t + 1, dtype=torch.bool)
        given[:, 0] = False
        columns = dynamics.clip_features(
            shown[:, : t + 1],
            shown[:, : t + 1],
            masked,
            actions[:, : t + 1],
            given,
            torch.cat((pos[:, :t], pos[:, t - 1 : t]), dim=1),
            torch.cat((things[:, :t], things[:, t - 1 : t]), dim=1),
            clip["domain"],
        )
        close = NEAR if owner.object_turns else CLOSE
        torch.testing.assert_close(features[:, t - 1], columns.pooled_BTD[:, t], **close)


@pytest.mark.parametrize("owner", [domain(), handling()], ids=["plain", "object"])
def test_in_place_training_shows_the_columns_of_a_rollout(owner: Domain) -> None:
    """The clip that training builds is the one that the test above compares rollouts with."""
    dynamics = model("soft", owner, conditioning="in_place")
    clip = batch("soft", dynamics, 2, 3)
    predicted = torch.tensor([[False, True, True], [False, False, True]])
    masked = predicted[..., None].expand(-1, -1, 4)
    own = tokens("soft", 2, 3, seed=9)  # what a rollout would have shown for frames 0, 1, 2
    other = batch("soft", dynamics, 2, 2, seed=9)
    own_pos, own_things = other["agent_pos"], other["targets"][..., : dynamics.object_size]
    given = torch.ones(2, 3, dtype=torch.bool)
    columns = dynamics._in_place_columns(
        clip["tokens"], own, masked, predicted, clip["actions"], given, own_pos, own_things, clip["domain"]
    )
    for row, first in enumerate((1, 2)):  # the first predicted frame sees own frames before it, clean
        rows = slice(row, row + 1)
        shown = torch.cat((own[rows, : first + 1], clip["tokens"][rows, first + 1 :]), dim=1)
        hidden = torch.zeros(1, first + 2, 4, dtype=torch.bool)
        hidden[:, first + 1 :] = True
        wanted = dynamics.clip_features(
            shown[:, : first + 2],
            shown[:, : first + 2],
            hidden,
            torch.cat((torch.zeros_like(clip["actions"][rows, :1]), clip["actions"][rows, : first + 1]), dim=1),
            torch.tensor([[False] + [True] * (first + 1)]),
            torch.cat((own_pos[rows, : first + 1], own_pos[rows, first : first + 1]), dim=1),
            torch.cat((own_things[rows, : first + 1], own_things[rows, first : first + 1]), dim=1),
            clip["domain"][rows],
        )
        close = NEAR if owner.object_turns else CLOSE
        torch.testing.assert_close(columns.pooled_BTD[row, first], wanted.pooled_BTD[0, first + 1], **close)


@pytest.mark.parametrize("conditioning", ["shifted", "in_place"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_unmasking_step_leaves_unmasked_tokens_untouched(kind: str, conditioning: str) -> None:
    one, two = (model(kind, conditioning=conditioning, decode_steps=steps) for steps in (1, 2))
    clip = batch(kind, one, 6, 1)
    (_, first), (_, second) = (next(rollout(m, begin(m, clip), clip["actions"])) for m in (one, two))
    unequal = one.head._patch(first.tokens) != one.head._patch(second.tokens)
    changed = unequal.any(dim=-1).sum(dim=-1)
    left = masked_after(0, 2, one.head.positions)
    assert (changed <= left).all() and changed.sum() > 0
    if kind == "soft":  # continuous samples are never equal by chance
        assert (changed == left).all()
    assert torch.equal(first.agent_pos_BP, second.agent_pos_BP)


@pytest.mark.parametrize("conditioning", ["shifted", "in_place"])
@pytest.mark.parametrize("steps", [1, 2])
def test_unmasking_steps_leave_the_cache_of_the_first_pass(conditioning: str, steps: int) -> None:
    dynamics = model("soft", conditioning=conditioning, decode_steps=steps)
    clip = batch("soft", dynamics, 2, 7)
    state = begin(dynamics, clip)
    for before in range(7):
        assert state.step_B.tolist() == [before] * 2
        copied, _ = dynamics.step(state, clip["actions"][:, before])
        state, _ = dynamics.step(state.clone(), clip["actions"][:, before], in_place=True)
        assert same(copied, state)


@pytest.mark.parametrize("kind", KINDS)
def test_step_leaves_its_state_alone(kind: str) -> None:
    dynamics = model(kind)
    clip = batch(kind, dynamics, 2, 6)
    states = [begin(dynamics, clip)]
    copies = [states[0].clone()]
    for state, _ in rollout(dynamics, states[0], clip["actions"]):
        states.append(state)
        copies.append(state.clone())
        dynamics.act(state)
    assert all(same(a, b) for a, b in zip(states, copies, strict=True))
    again, _ = dynamics.step(states[3], clip["actions"][:, 3])  # an old state can be gone on from
    assert same(again, states[4])


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_do_not_matter(kind: str) -> None:
    dynamics = model(kind, decode_steps=2)
    clip = batch(kind, dynamics, 4, 6)
    together, pos, _, _ = _played(dynamics, clip)
    for row in (0, 3):
        rows = slice(row, row + 1)
        state = begin(dynamics, {k: v[rows] for k, v in clip.items()}, seeds=torch.tensor([row]))
        for t, (_, out) in enumerate(rollout(dynamics, state, clip["actions"][rows])):
            torch.testing.assert_close(out.tokens, together[rows, t + 1], **CLOSE)
            torch.testing.assert_close(out.agent_pos_BP, pos[rows, t + 1], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_reproduce_and_differ(kind: str) -> None:
    dynamics = model(kind)
    clip = batch(kind, dynamics, 1, 4)
    four = {k: v.expand(4, *v.shape[1:]) for k, v in clip.items()}
    state = begin(dynamics, four, seeds=torch.tensor([5, 6, 5, -7]))
    last = [out.tokens for _, out in rollout(dynamics, state, four["actions"])][-1]
    torch.testing.assert_close(last[0], last[2], **CLOSE)  # rows of one batch are rounded alike only nearly
    assert not torch.allclose(last[0], last[1]) and not torch.allclose(last[0], last[3])
    again = begin(dynamics, four, seeds=torch.tensor([5, 6, 5, -7]))
    assert torch.equal([out.tokens for _, out in rollout(dynamics, again, four["actions"])][-1], last)
    greedy = model(kind, temperature=0.0)
    last = [out.tokens for _, out in rollout(greedy, begin(greedy, four, torch.arange(4)), four["actions"])][-1]
    torch.testing.assert_close(last, last[:1].expand_as(last), **CLOSE)


def test_select_fork_where_and_reseed() -> None:
    dynamics = model("soft")
    clip = batch("soft", dynamics, 3, 8)
    *_, (late, _) = rollout(dynamics, begin(dynamics, clip), clip["actions"][:, :6])
    fresh = begin(dynamics, clip, seeds=torch.tensor([100, 101, 102]))
    mask = torch.tensor([False, True, False])
    mixed = late.where(mask, fresh)
    assert mixed.step_B.tolist() == [6, 0, 6] and mixed.seed_B.tolist() == [0, 101, 2]
    action = clip["actions"][:, 6]
    (_, of_late), (_, of_fresh), (_, of_mixed) = (dynamics.step(s, action) for s in (late, fresh, mixed))
    wanted = torch.where(mask[:, None, None], of_fresh.tokens, of_late.tokens)
    torch.testing.assert_close(of_mixed.tokens, wanted, **CLOSE)

    picked = late.select(torch.tensor([2, 2, 0]))
    _, out = dynamics.step(picked, action[[2, 2, 0]])
    torch.testing.assert_close(out.tokens, of_late.tokens[[2, 2, 0]], **CLOSE)
    forked = late.fork(2)
    assert forked.seed_B.tolist() == [0, 0, 1, 1, 2, 2]
    _, out = dynamics.step(forked, action.repeat_interleave(2, dim=0))
    torch.testing.assert_close(out.tokens, of_late.tokens.repeat_interleave(2, dim=0), **CLOSE)
    _, out = dynamics.step(forked.reseed(torch.arange(6)), action.repeat_interleave(2, dim=0))
    assert not torch.allclose(out.tokens[4], out.tokens[5])


def test_states_survive_files_and_refuse_foreign_ones() -> None:
    dynamics = model("vq")
    clip = batch("vq", dynamics, 2, 3)
    *_, (state, _) = rollout(dynamics, begin(dynamics, clip), clip["actions"])
    saved = state.to_dict()
    assert same(RolloutState.from_dict(saved), state)
    saved["tokens"] += 1  # a copy, not a view
    assert not torch.equal(saved["tokens"], state.tokens)
    with pytest.raises(EnvironmentState, match="a rollout state has the tensors"):
        RolloutState.from_dict({k: v for k, v in saved.items() if k != "seed_B"})
    with pytest.raises(EnvironmentState, match="extra"):
        RolloutState.from_dict({**saved, "extra": saved["tokens"]})


@pytest.mark.parametrize("kind", KINDS)
def test_domains_in_one_batch_give_what_they_give_alone(kind: str) -> None:
    dynamics = model(kind, *TWO)
    clip = batch(kind, dynamics, 4, 6)
    together, pos, _, _ = _played(dynamics, clip)
    assert dynamics.action_size == 14 and dynamics.state_size == 2
    for index, name in enumerate(("small", "large")):
        rows = torch.tensor([index, index + 2])
        state = dynamics.start(clip["tokens"][rows, 0], clip["agent_pos"][rows, 0], rows, domain=name)
        for t, (_, out) in enumerate(rollout(dynamics, state, clip["actions"][rows])):
            torch.testing.assert_close(out.tokens, together[rows, t + 1], **CLOSE)
            torch.testing.assert_close(out.agent_pos_BP, pos[rows, t + 1], **CLOSE)
    assert torch.equal(pos[1], torch.zeros_like(pos[1]))  # "large" has no state


def test_padding_of_narrow_domains_has_no_influence() -> None:
    dynamics = model("soft", *TWO)
    clip = batch("soft", dynamics, 2, 2)
    shown, *_ = _played(dynamics, clip)
    clip["actions"][0, :, 2:] = 9.0  # "small" has two action dims
    clip["agent_pos"][1] = 9.0  # "large" has no state
    again, *_ = _played(dynamics, clip)
    assert torch.equal(shown, again)


def test_every_action_of_a_chunk_matters() -> None:
    """With a stride of 3 the frame depends on all three actions, the last one included."""
    dynamics = model("soft", domain(actions=2, stride=3), temperature=0.0)
    clip = batch("soft", dynamics, 1, 1)
    state, action = begin(dynamics, clip), clip["actions"][:, 0]
    assert action.shape == (1, 6)
    _, out = dynamics.step(state, action)
    for i in range(6):
        changed = action.clone()
        changed[0, i] += 0.5
        _, other = dynamics.step(state, changed)
        assert (other.tokens - out.tokens).abs().max() > 1e-4


def test_actions_are_normalised_with_their_domain() -> None:
    dynamics = model("soft", *TWO)
    raw = torch.zeros(2, 1, 14)
    normal = dynamics.normalise_actions(raw, torch.tensor([0, 1]))
    for row, owner in enumerate(TWO):
        wanted = -torch.tensor(owner.action_mean) / torch.tensor(owner.action_std)
        torch.testing.assert_close(normal[row, 0, : owner.action_dim], wanted)
    assert (normal[0, 0, 2:] == 0).all()


@pytest.mark.parametrize("conditioning", ["shifted", "in_place"])
def test_observing_a_frame_is_stepping_with_the_frame_given(conditioning: str) -> None:
    dynamics = model("soft", conditioning=conditioning)
    clip = batch("soft", dynamics, 2, 3)
    state = begin(dynamics, clip)
    stepped, out = dynamics.step(state, clip["actions"][:, 0])
    assert same(dynamics.observe(state, clip["actions"][:, 0], out.tokens, None), stepped)
    real = dynamics.observe(state, clip["actions"][:, 0], clip["tokens"][:, 1], clip["agent_pos"][:, 1])
    assert torch.equal(real.tokens, clip["tokens"][:, 1])
    assert torch.equal(real.agent_pos_BP, clip["agent_pos"][:, 1])


def test_passive_steps_need_no_action_and_differ_from_zero_actions() -> None:
    dynamics = model("soft")
    clip = batch("soft", dynamics, 2, 1)
    state = begin(dynamics, clip)
    after, passive = dynamics.step(state, None)
    _, still = dynamics.step(state, torch.zeros(2, 3))
    assert not torch.allclose(passive.tokens, still.tokens)
    assert not after.acted_BK[:, 0].any()
    nothing = model("soft", domain(actions=0))
    assert nothing.action_size == 0 and nothing.act(begin(nothing, clip)).shape == (2, 0)
    _, out = nothing.step(begin(nothing, clip), None)
    assert out.tokens.isfinite().all()


def test_act_is_in_env_units_of_each_domain() -> None:
    dynamics = model("soft", *TWO)
    for index in range(2):
        dynamics.adapter(index).action_out.weight.zero_()
        dynamics.adapter(index).action_out.bias.fill_(1.0)
    action = dynamics.act(begin(dynamics, batch("soft", dynamics, 2, 1)))
    for row, owner in enumerate(TWO):
        wanted = torch.tensor(owner.action_mean) + torch.tensor(owner.action_std)
        torch.testing.assert_close(action[row, : owner.action_dim], wanted)
    assert (action[0, 2:] == 0).all()


@pytest.mark.parametrize("conditioning", ["shifted", "in_place"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_made_on_another_device(kind: str, conditioning: str) -> None:
    """Tensors without memory refuse to meet real ones, so a forgotten ``device=`` shows without a GPU."""
    dynamics = model(kind, conditioning=conditioning, decode_steps=2).to("meta")
    clip = {k: v.to("meta") for k, v in batch(kind, dynamics, 2, 1).items()}
    state = begin(dynamics, clip, seeds=torch.zeros(2, dtype=torch.int64, device="meta"))
    for action in (clip["actions"][:, 0], None):
        state, out = dynamics.step(state, action)
        for field in dataclasses.fields(out):
            assert getattr(out, field.name).device.type == "meta"
    assert dynamics.act(state).device.type == "meta"


def test_low_precision_stays_near() -> None:
    dynamics = model("soft", temperature=0.0)
    clip = batch("soft", dynamics, 2, 6)
    shown, *_ = _played(dynamics, clip)
    with torch.autocast("cpu", torch.bfloat16):
        low, *_ = _played(dynamics, clip)
    assert low.dtype == torch.float32
    assert float((low - shown).abs().max()) < 0.1 * float((shown[:, 1:] - shown[:, :-1]).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_configs_survive_json_and_are_strict(kind: str) -> None:
    config = model(kind, conditioning="in_place").config
    fields = json.loads(json.dumps(config.to_dict()))
    assert DynamicsConfig.from_dict(fields) == config
    with pytest.raises(CheckpointError, match="unknown: .'depth'"):
        DynamicsConfig.from_dict({**fields, "depth": 3})
    with pytest.raises(CheckpointError, match="missing: .'window'"):
        DynamicsConfig.from_dict({**fields, "trunk": {k: v for k, v in fields["trunk"].items() if k != "window"}})
    with pytest.raises(CheckpointError, match="head kind must be one of"):
        DynamicsConfig.from_dict({**fields, "head": {**fields["head"], "kind": "wavelet"}})


def test_errors_say_what_to_do() -> None:
    dynamics = model("soft", *TWO)
    clip = batch("soft", dynamics, 2, 1)
    state = begin(dynamics, clip)
    with pytest.raises(InvalidAction, match=r"shape \(2, 14\).*got \(2, 2\)"):
        dynamics.step(state, torch.zeros(2, 2))
    with pytest.raises(UnknownName, match="choose one of: large, small"):
        dynamics.start(clip["tokens"][:, 0], None, torch.arange(2), domain="medium")
    with pytest.raises(InvalidArgument, match="domain must be named"):
        dynamics.start(clip["tokens"][:, 0], None, torch.arange(2))
    for names in (("a", "a"), ("a.b",), ("keys",), ()):
        with pytest.raises(InvalidArgument, match="domains with different names"):
            Dynamics(dynamics.config, [domain(name) for name in names])
    with pytest.raises(InvalidArgument, match="decode_steps"):
        DynamicsConfig(decode_steps=0)
    with pytest.raises(InvalidArgument, match="conditioning"):
        DynamicsConfig(conditioning="sideways")  # type: ignore[arg-type]
