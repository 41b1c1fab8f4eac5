"""A world with an object: its pose is read off the first frame, foretold, drawn, corrected by what is seen, kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from toy_dynamics import batch, begin, domain, handling, model, rollout, same

from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.rollout import RolloutState
from hma_gym.errors import EnvironmentState, InvalidArgument

SMALL = domain("small", actions=2, state=2, targets=1)
MIXED = (SMALL, handling())  # rows of a batch are of one and the other in turn


def test_a_rollout_begins_with_what_the_body_sees() -> None:
    dynamics = model("soft", *MIXED)
    clip = batch("soft", dynamics, 4, 1)
    state = begin(dynamics, clip)
    rows = torch.tensor([1, 3])
    seen = dynamics.adapter(1).body.sighted(clip["tokens"][rows, 0], clip["agent_pos"][rows, 0], None)
    torch.testing.assert_close(state.targets_BO[rows], seen)
    assert not state.targets_BO[[0, 2]].any() and not state.target_motions_BKO.any()
    assert dynamics.object_size == 9 and state.targets_BO.shape == (4, 9)
    other = begin(dynamics, {**clip, "tokens": clip["tokens"] + 1.0})
    assert not torch.allclose(other.targets_BO[rows], seen)


def test_each_step_foretells_the_object_and_remembers_how_it_moved() -> None:
    dynamics = model("soft", *MIXED)
    clip = batch("soft", dynamics, 4, 5)
    state, rows = begin(dynamics, clip), torch.tensor([1, 3])
    body, moved = dynamics.adapter(1).body, 0.0
    for t, (after, out) in enumerate(rollout(dynamics, state, clip["actions"])):
        pose = state.pose.rows(rows)
        action = dynamics.normalise_actions(clip["actions"][:, t : t + 1], clip["domain"])[rows, 0]
        _, coasted = body.coasted(pose, action, torch.ones(2, dtype=torch.bool))
        torch.testing.assert_close(after.targets_BO[rows], coasted, rtol=1e-4, atol=1e-5)
        assert torch.equal(out.targets_BX[rows], after.targets_BO[rows])
        torch.testing.assert_close(after.target_motions_BKO[:, 0], after.targets_BO - state.targets_BO)
        assert torch.equal(after.target_motions_BKO[:, 1:], state.target_motions_BKO[:, :-1])
        assert not after.targets_BO[[0, 2]].any()  # padding
        moved = max(moved, float((after.targets_BO - state.targets_BO).abs().max()))
        state = after
    assert moved > 1e-3


def test_frames_are_drawn_with_the_object_where_it_is() -> None:
    dynamics = model("soft", handling(), temperature=0.0)
    clip = batch("soft", dynamics, 2, 1)
    state = begin(dynamics, clip)
    body = dynamics.adapter(0).body
    for column, change in ((0, 0.05), (4, 0.3)):  # its place, and its rotation
        targets = state.targets_BO.clone()
        targets[:, column] += change
        other = dataclasses.replace(state, targets_BO=targets)
        shown, moved = (dynamics.step(s, clip["actions"][:, 0])[1].tokens for s in (state, other))
        assert not torch.allclose(shown, moved, atol=1e-3)
        one, two = (body.drawn(s.agent_pos_BP, s.targets_BO) for s in (state, other))
        assert one is not None and two is not None and not torch.allclose(one, two, atol=1e-3)


def test_the_motion_of_the_object_is_an_input() -> None:
    dynamics = model("soft", handling())
    clip = batch("soft", dynamics, 2, 1)
    state = begin(dynamics, clip)
    pushed = dataclasses.replace(state, target_motions_BKO=state.target_motions_BKO + 0.01)
    after, other = (dynamics.step(s, clip["actions"][:, 0])[0] for s in (state, pushed))
    assert not torch.allclose(after.targets_BO, other.targets_BO)


@pytest.mark.parametrize("conditioning", ["shifted", "in_place"])
def test_what_is_observed_corrects_the_place_and_is_no_motion(conditioning: str) -> None:
    dynamics = model("soft", *MIXED, conditioning=conditioning)
    clip = batch("soft", dynamics, 4, 2)
    state, rows = begin(dynamics, clip), torch.tensor([1, 3])
    action, tokens = clip["actions"][:, 0], clip["tokens"][:, 1]
    believed = dynamics.observe(state, action, tokens, None)  # as foretold
    agent_pos = clip["agent_pos"][:, 1]
    real = dynamics.observe(state, action, tokens, agent_pos)
    adapter, given = dynamics.adapter(1), torch.ones(2, dtype=torch.bool)
    before = dynamics._rollout_pose(state).rows((rows, 0)).narrowed(9, 9, adapter.action_size)
    normal = dynamics.normalise_actions(action[:, None], state.domain_B)[rows, 0, : adapter.action_size]
    seen = adapter.body.observed(before, normal, given, tokens[rows], agent_pos[rows])
    torch.testing.assert_close(real.targets_BO[rows], seen.targets)
    assert not torch.allclose(real.targets_BO[rows, :3], believed.targets_BO[rows, :3], atol=1e-4)
    torch.testing.assert_close(real.targets_BO[rows, 3:], believed.targets_BO[rows, 3:])
    torch.testing.assert_close(real.target_motions_BKO[rows], seen.target_motions)
    far = (real.targets_BO - state.targets_BO)[rows, :3] - real.target_motions_BKO[rows, 0, :3]
    assert far.norm(dim=-1).min() > 1e-4  # what the picture corrected did not move
    torch.testing.assert_close(real.motions_BKP[:, 0], agent_pos - state.agent_pos_BP)
    assert not real.targets_BO[[0, 2]].any()


def test_a_sketch_is_what_the_bodies_foretell_and_draw() -> None:
    dynamics = model("soft", *MIXED)
    clip = batch("soft", dynamics, 4, 5)
    state = begin(dynamics, clip)
    rows = [torch.tensor([0, 2]), torch.tensor([1, 3])]
    poses = []
    for index, own in enumerate(rows):
        adapter = dynamics.adapter(index)
        sizes = adapter.domain.state_dim, adapter.body.target_dim, adapter.action_size
        poses.append(state.pose.rows(own).narrowed(*sizes))
    given = torch.ones(2, dtype=torch.bool)
    for t in range(4):
        state, out = dynamics.step_of_bodies(state, clip["actions"][:, t])
        normal = dynamics.normalise_actions(clip["actions"][:, t : t + 1], clip["domain"])[:, 0]
        for index, own in enumerate(rows):
            adapter = dynamics.adapter(index)
            action = normal[own, : adapter.action_size]
            agent_pos, targets = adapter.body.coasted(poses[index], action, given)
            poses[index] = poses[index].after(agent_pos, targets, action, given)
            torch.testing.assert_close(out.agent_pos_BP[own, : agent_pos.shape[1]], agent_pos)
            torch.testing.assert_close(state.targets_BO[own, : targets.shape[1]], targets)
            torch.testing.assert_close(out.tokens[own], adapter.body.drawn(agent_pos, targets))
    torch.testing.assert_close(out.targets_BX[rows[1]], state.targets_BO[rows[1]])
    assert torch.equal(out.tokens, state.tokens) and not out.features_BD.any() and (state.step_B == 4).all()


def test_discrete_tokens_cannot_be_sketched() -> None:
    dynamics = model("vq")
    clip = batch("vq", dynamics, 2, 1)
    with pytest.raises(InvalidArgument, match="must have agent_pos and soft tokens for its body to draw"):
        dynamics.step_of_bodies(begin(dynamics, clip), clip["actions"][:, 0])


def test_states_carry_the_object_wherever_they_go() -> None:
    dynamics = model("soft", *MIXED)
    clip = batch("soft", dynamics, 4, 4)
    *_, (late, _) = rollout(dynamics, begin(dynamics, clip), clip["actions"][:, :3])
    assert late.targets_BO[1].any() and late.target_motions_BKO[1].any()
    picked = late.select(torch.tensor([3, 1]))
    assert torch.equal(picked.targets_BO, late.targets_BO[[3, 1]])
    assert torch.equal(picked.target_motions_BKO, late.target_motions_BKO[[3, 1]])
    assert torch.equal(late.fork(2).targets_BO, late.targets_BO.repeat_interleave(2, dim=0))
    fresh = begin(dynamics, clip)
    mixed = late.where(torch.tensor([False, True, False, False]), fresh)
    assert torch.equal(mixed.targets_BO[1], fresh.targets_BO[1]) and torch.equal(
        mixed.targets_BO[3], late.targets_BO[3]
    )
    saved = late.to_dict()
    assert same(RolloutState.from_dict(saved), late)
    action = clip["actions"][:, 3]
    resumed, _ = dynamics.step(RolloutState.from_dict(saved), action)
    assert same(resumed, dynamics.step(late, action)[0])
    del saved["targets_BO"]  # as a version that knew no objects saved it
    with pytest.raises(EnvironmentState, match="targets_BO"):
        RolloutState.from_dict(saved)


def test_domains_with_and_without_an_object_share_a_batch() -> None:
    dynamics = model("soft", *MIXED)
    clip = batch("soft", dynamics, 4, 5)
    together = [
        (s.targets_BO, o.tokens, o.targets_BX) for s, o in rollout(dynamics, begin(dynamics, clip), clip["actions"])
    ]
    for index, owner in enumerate(MIXED):
        rows = torch.tensor([index, index + 2])
        state = dynamics.start(clip["tokens"][rows, 0], clip["agent_pos"][rows, 0], rows, domain=owner.name)
        for t, (after, out) in enumerate(rollout(dynamics, state, clip["actions"][rows])):
            for ours, theirs in zip((after.targets_BO, out.tokens, out.targets_BX), together[t], strict=True):
                torch.testing.assert_close(ours, theirs[rows], rtol=1e-3, atol=2e-4)
            assert out.targets_BX[:, owner.target_dim :].abs().sum() == 0
    assert together[-1][2].shape == (4, 9)


def test_nothing_is_made_on_another_device() -> None:
    dynamics = model("soft", handling(), decode_steps=2).to("meta")
    clip = {k: v.to("meta") for k, v in batch("soft", dynamics, 2, 1).items()}
    state = begin(dynamics, clip, seeds=torch.zeros(2, dtype=torch.int64, device="meta"))
    state, _ = dynamics.step(state, clip["actions"][:, 0])
    state = dynamics.observe(state, clip["actions"][:, 0], clip["tokens"][:, 1], clip["agent_pos"][:, 1])
    assert state.targets_BO.device.type == state.target_motions_BKO.device.type == "meta"


@pytest.mark.parametrize(("kind", "turns"), [("soft", 0), ("vq", 4)])
def test_without_turns_or_with_discrete_tokens_a_head_foretells_the_targets(kind: str, turns: int) -> None:
    """The pose is then a privileged target like any other, and no part of the state."""
    dynamics = model(kind, handling(object_turns=turns))
    clip = batch(kind, dynamics, 2, 3)
    state = begin(dynamics, clip)
    assert dynamics.object_size == 0 and state.targets_BO.shape == (2, 0)
    assert dynamics.adapter(0).target_out is not None and dynamics.adapter(0).body.sight is None
    for _, out in rollout(dynamics, state, clip["actions"]):
        assert out.targets_BX.shape == (2, 9) and out.targets_BX.isfinite().all()
    del clip["targets"]  # they are not needed then
    assert dynamics.loss(clip, torch.Generator().manual_seed(0))[0].isfinite()


# ---------------------------------------------------------------- training


def _loss(dynamics: Dynamics, clip: dict[str, Tensor], seed: int = 0) -> float:
    return float(dynamics.loss(clip, torch.Generator().manual_seed(seed))[0])


@pytest.mark.parametrize("conditioning", ["shifted", "in_place"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_training_is_given_where_the_object_is(conditioning: str, share: float) -> None:
    dynamics = model("soft", *MIXED, conditioning=conditioning, rollout_share=share, rollout_max=2, action_mask=0.3)
    clip = batch("soft", dynamics, 4, 5)
    first = _loss(dynamics, clip)
    assert first == _loss(dynamics, clip) and torch.isfinite(torch.tensor(first))
    moved = clip["targets"].clone()
    moved[1::2, :, :3] += 0.05  # of the rows that have an object
    assert _loss(dynamics, {**clip, "targets": moved}) != first


def test_training_needs_the_objects_poses() -> None:
    dynamics = model("soft", *MIXED)
    clip = batch("soft", dynamics, 2, 3)
    del clip["targets"]
    with pytest.raises(InvalidArgument, match="must have targets.*object_turns > 0.*object_turns=0"):
        _loss(dynamics, clip)


def test_own_rollouts_show_own_frames_of_the_true_poses() -> None:
    dynamics = model("soft", handling(), rollout_share=1.0, rollout_max=2, state_noise=0.0)
    clip = batch("soft", dynamics, 3, 5)
    seen: list[tuple[Tensor, ...]] = []
    original = dynamics.clip_features

    def spy(*inputs: Tensor) -> object:
        seen.append(inputs)
        return original(*inputs)

    dynamics.clip_features = spy  # type: ignore[method-assign,assignment]
    begun = set()
    for seed in range(12):
        seen.clear()
        _loss(dynamics, clip, seed)
        _, previous, _, _, _, agent_pos, things, *_ = seen[0]
        first = [t for t in range(3) if torch.equal(things[:, 0], clip["targets"][:, t])]
        assert len(first) == 1 and previous.shape[1] == 3
        begun.add(first[0])
        truth = slice(first[0], first[0] + 3)
        assert torch.equal(things, clip["targets"][:, truth]) and torch.equal(agent_pos, clip["agent_pos"][:, truth])
        real = [torch.equal(previous[:, t], clip["tokens"][:, first[0] + t]) for t in range(3)]
        assert real == [first[0] == 0, False, False]
    assert begun == {0, 1, 2}


@pytest.mark.parametrize("conditioning", ["shifted", "in_place"])
def test_every_parameter_of_the_object_learns(conditioning: str) -> None:
    dynamics = model("soft", *MIXED, conditioning=conditioning, action_mask=0.5, mask_full=0.3).requires_grad_(True)
    dynamics.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        loss, _ = dynamics.loss(batch("soft", dynamics, 8, 4), generator)
        loss.backward()  # type: ignore[no-untyped-call]
    idle = [n for n, p in dynamics.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    alone = ["adapters.hand.body.sight"]  # is trained with the body, on single frames
    if conditioning == "in_place":
        alone.append("head.previous_in")  # frames hold their own tokens only
    assert [name for name in idle if not name.startswith(tuple(alone))] == []
    listed = {id(p) for group in dynamics.parameter_groups() for p in group.parameters}
    assert listed == {id(p) for p in dynamics.parameters()}
