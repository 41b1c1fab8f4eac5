"""The robot's own body: a history that is the same in clips and rollouts, and networks that learn from it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy_dynamics import SOFT, batch, begin, domain, model

from hma_gym.dynamics.body import Body, BodyConfig
from hma_gym.dynamics.pose import Pose, clip_poses, first_pose
from hma_gym.training import Optimizer, OptimizerConfig

SMALL = BodyConfig(history=2, octaves=2, coast_width=32, look_width=32, look_layers=1)
NOTHING = torch.zeros(1, 0)  # where no object is


def _equal(a: Pose, b: Pose) -> None:
    for field in dataclasses.fields(Pose):
        torch.testing.assert_close(getattr(a, field.name), getattr(b, field.name))


@pytest.mark.parametrize("history", [1, 3])
def test_the_poses_of_a_clip_are_those_of_stepping_through_it(history: int) -> None:
    generator = torch.Generator().manual_seed(0)
    agent_pos_BTP, targets_BTX = torch.randn(4, 6, 2, generator=generator), torch.randn(4, 6, 5, generator=generator)
    actions_BTA = torch.randn(4, 6, 3, generator=generator)
    given_BT, at_rest_B = torch.rand(4, 6, generator=generator) < 0.7, torch.tensor([True, False, True, False])
    clip = clip_poses(agent_pos_BTP, targets_BTX, actions_BTA, given_BT, history, at_rest_B)
    pose = first_pose(agent_pos_BTP[:, 0], targets_BTX[:, 0], history, 3, at_rest_B)
    _equal(clip.rows(slice(None)).narrowed(2, 5, 3), clip)
    for t in range(6):
        _equal(Pose(*(getattr(clip, f.name)[:, t] for f in dataclasses.fields(Pose))), pose)
        if t < 5:
            pose = pose.after(agent_pos_BTP[:, t + 1], targets_BTX[:, t + 1], actions_BTA[:, t], given_BT[:, t])


def test_a_pose_is_narrowed_to_its_own_domain() -> None:
    wide = first_pose(torch.randn(4, 6), torch.randn(4, 9), 2, 5, torch.ones(4, dtype=torch.bool))
    wide = wide.after(torch.randn(4, 6), torch.randn(4, 9), torch.randn(4, 5), torch.ones(4, dtype=torch.bool))
    own = wide.rows(torch.tensor([3, 1])).narrowed(2, 0, 3)
    assert own.targets.shape == (2, 0) and own.target_motions.shape == (2, 2, 0)
    torch.testing.assert_close(own.agent_pos, wide.agent_pos[[3, 1], :2])
    torch.testing.assert_close(own.motions, wide.motions[[3, 1], :, :2])
    torch.testing.assert_close(own.actions, wide.actions[[3, 1], :, :3])


def test_unknown_motion_and_hidden_actions_have_no_effect() -> None:
    body = model("soft").adapter(0).body
    pose = first_pose(torch.zeros(1, 2), NOTHING, 3, 3, torch.tensor([False]))
    action, hidden = torch.ones(1, 3), torch.tensor([False])
    expected, _ = body.coasted(pose, action, hidden)
    other = dataclasses.replace(pose, motions=pose.motions + 1.0, actions=pose.actions + 1.0)
    torch.testing.assert_close(body.coasted(other, action + 1.0, hidden)[0], expected)
    known = dataclasses.replace(other, known=torch.ones_like(pose.known))
    assert not torch.allclose(body.coasted(known, action, hidden)[0], expected)
    assert not torch.allclose(body.coasted(pose, action, ~hidden)[0], expected)


def test_an_untrained_body_stands_still_and_looks_like_the_mean() -> None:
    body = Body(domain(), SMALL, (*SOFT.grid, SOFT.channels))
    mean = torch.randn(16, SOFT.channels)
    body.set_token_statistics(mean, torch.ones_like(mean))
    pose = first_pose(torch.randn(5, 2), torch.zeros(5, 0), 2, 3, torch.ones(5, dtype=torch.bool))
    agent_pos, targets = body.coasted(pose, torch.randn(5, 3), torch.ones(5, dtype=torch.bool))
    assert torch.equal(agent_pos, pose.agent_pos) and targets.shape == (5, 0)
    drawn = body.drawn(pose.agent_pos, targets)
    assert drawn is not None and torch.equal(drawn, mean.expand(5, -1, -1))


def test_discrete_tokens_are_not_drawn() -> None:
    body = model("vq").adapter(0).body
    assert body.look is None and body.drawn(torch.zeros(1, 2), NOTHING) is None


def test_a_frozen_body_does_not_learn_with_the_trunk() -> None:
    dynamics = model("soft").train().requires_grad_(True)
    dynamics.freeze_bodies()
    before = {name: value.clone() for name, value in dynamics.state_dict().items()}
    optimizer = Optimizer(dynamics, dynamics.parameter_groups(), OptimizerConfig(lr=1e-2))
    loss, _ = dynamics.loss(batch("soft", dynamics, 4, 3), torch.Generator().manual_seed(0))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step(1.0)
    changed = {name for name, value in dynamics.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(".body." in name for name in changed)


def _swing(rows: int, frames: int, seed: int) -> dict[str, torch.Tensor]:
    """A damped mass pushed by the action: each change is 0.7 of the last one and 0.1 of the action."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randn(rows, frames, 1, generator=generator)
    place, motion = torch.randn(rows, 1, generator=generator), torch.zeros(rows, 1)
    places = [place]
    for t in range(frames):
        motion = 0.7 * motion + 0.1 * actions[:, t]
        place = place + motion
        places.append(place)
    poses = torch.randn(64, 1, generator=generator)
    return {
        "agent_pos": torch.stack(places, dim=1),
        "targets": torch.zeros(rows, frames + 1, 0),
        "actions": actions,
        "at_rest": torch.ones(rows, dtype=torch.bool),
        "poses": poses,
        "places": torch.zeros(64, 0),
        "tokens": torch.cat((poses.cos(), poses.sin()), dim=-1)[:, None] * torch.ones(1, 4, 1),
    }


def test_a_body_learns_to_coast_for_many_steps_and_what_it_looks_like() -> None:
    torch.manual_seed(0)
    own = dataclasses.replace(domain(actions=1, state=1, targets=0), delta_std=(0.15,), state_mean=(0.0,))
    body = Body(own, SMALL, (2, 2, 2))
    optimizer = Optimizer(body, body.parameter_groups(), OptimizerConfig(lr=5e-3, weight_decay=0.0))
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        loss, _ = body.loss(_swing(32, 8, step), generator)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0 - step / 300)
    body.requires_grad_(False)
    clip = _swing(64, 20, 10_000)
    given = torch.ones(64, dtype=torch.bool)
    pose = first_pose(clip["agent_pos"][:, 0], clip["targets"][:, 0], 2, 1, clip["at_rest"])
    for t in range(20):
        pose = pose.after(*body.coasted(pose, clip["actions"][:, t], given), clip["actions"][:, t], given)
    error = (pose.agent_pos - clip["agent_pos"][:, -1]).abs().mean()
    assert error < 0.15 * (clip["agent_pos"][:, -1] - clip["agent_pos"][:, 0]).abs().mean()
    drawn = body.drawn(clip["poses"], clip["places"])
    assert drawn is not None and (drawn - clip["tokens"]).abs().mean() < 0.1


def test_the_gate_brings_a_spoilt_frame_back_to_what_the_body_draws() -> None:
    """With the gate open, errors of the previous frame leave no trace in the next one."""
    dynamics = model("soft", temperature=0.0)
    clip = batch("soft", dynamics, 2, 2)
    for parameter in (dynamics.head.mean_out.weight, dynamics.head.mean_out.bias, dynamics.head.gate_out.weight):
        parameter.zero_()
    dynamics.head.gate_out.bias.fill_(20.0)
    state = begin(dynamics, clip)
    spoilt = dataclasses.replace(state, tokens=state.tokens + 1.0)
    frames = [dynamics.step(s, clip["actions"][:, 0])[1].tokens for s in (state, spoilt)]
    torch.testing.assert_close(frames[0], frames[1])
    body = dynamics.adapter(0).body
    pose = first_pose(state.agent_pos_BP, state.targets_BO, 3, 3, torch.ones(2, dtype=torch.bool))
    action = dynamics.normalise_actions(clip["actions"][:, :1], clip["domain"])[:, 0]
    drawn = body.drawn(*body.coasted(pose, action, torch.ones(2, dtype=torch.bool)))
    torch.testing.assert_close(frames[0], drawn)


def test_transitions_that_are_shown_are_not_scored_but_remembered() -> None:
    """``warm`` transitions give the history that the others are foretold with."""
    body = Body(domain("arm", actions=2, state=3), BodyConfig(history=2), None)
    torch.manual_seed(0)
    torch.nn.init.normal_(body.coast.network[6].weight)  # type: ignore[union-attr]
    batch = {
        "agent_pos": torch.randn(5, 4, 3).cumsum(dim=1),
        "targets": torch.zeros(5, 4, 0),
        "actions": torch.randn(5, 3, 2),
        "at_rest": torch.zeros(5, dtype=torch.bool),
        "warm": torch.tensor(2),
    }
    loss, _ = body.loss(batch, torch.Generator().manual_seed(1))
    spoilt = {**batch, "agent_pos": batch["agent_pos"].clone()}
    spoilt["agent_pos"][:, 1] += 1.0  # was shown: it changes the motions of the scored transition
    assert not torch.equal(body.loss(spoilt, torch.Generator().manual_seed(1))[0], loss)
    given = torch.ones(5, dtype=torch.bool)
    nothing = batch["targets"][:, 0]
    pose = first_pose(batch["agent_pos"][:, 0], nothing, 2, 2, batch["at_rest"])
    for t in range(2):
        pose = pose.after(batch["agent_pos"][:, t + 1], nothing, batch["actions"][:, t], given)
    found, _ = body.coasted(pose, batch["actions"][:, 2], given)
    error = (found - batch["agent_pos"][:, 3]) / body.get_buffer("delta_std")
    torch.testing.assert_close(loss, ((error.square() + 0.01).sqrt() - 0.1).mean())
