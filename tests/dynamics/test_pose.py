"""Proprioception: the last change of agent_pos is an input, in rollouts as in clips, and lets the model coast."""

from __future__ import annotations

import torch
from toy_dynamics import batch, begin, domain, model, rollout, tokens

from hma_gym.training import Optimizer, OptimizerConfig


def test_motion_is_the_last_change_of_agent_pos() -> None:
    dynamics = model("soft")
    clip = batch("soft", dynamics, 3, 4)
    state = begin(dynamics, clip)
    assert not state.motions_BKP.any()
    for after, _ in rollout(dynamics, state, clip["actions"]):
        torch.testing.assert_close(after.motions_BKP[:, 0], after.agent_pos_BP - state.agent_pos_BP)
        assert torch.equal(after.motions_BKP[:, 1:], state.motions_BKP[:, :-1])
        state = after


def test_motion_of_observed_frames_is_the_true_change() -> None:
    dynamics = model("soft")
    clip = batch("soft", dynamics, 3, 4)
    state = begin(dynamics, clip)
    for t in range(3):
        known = clip["agent_pos"][:, t + 1]
        state = dynamics.observe(state, clip["actions"][:, t], clip["tokens"][:, t + 1], known)
        torch.testing.assert_close(state.motions_BKP[:, 0], known - clip["agent_pos"][:, t])


def test_motion_matters() -> None:
    dynamics = model("soft")
    clip = batch("soft", dynamics, 2, 2)
    state = begin(dynamics, clip)
    pushed = state.map(torch.clone)
    pushed.motions_BKP.add_(1.0)
    after, other = (dynamics.step(s, clip["actions"][:, 0])[0] for s in (state, pushed))
    assert not torch.allclose(after.agent_pos_BP, other.agent_pos_BP)


def test_a_clip_at_rest_is_not_one_of_unknown_motion() -> None:
    dynamics = model("soft")
    clip = batch("soft", dynamics, 2, 5)
    inputs = (
        clip["tokens"][:, 1:],
        clip["tokens"][:, :-1],
        torch.ones(2, 5, dynamics.head.positions, dtype=torch.bool),
        dynamics.normalise_actions(clip["actions"], clip["domain"]),
        torch.ones(2, 5, dtype=torch.bool),
        clip["agent_pos"][:, :-1],
        torch.zeros(2, 5, 0),
        clip["domain"],
    )
    history = dynamics.config.body.history
    unknown = dynamics.clip_features(*inputs).coasted_BTP
    mixed = dynamics.clip_features(*inputs, torch.tensor([True, False])).coasted_BTP
    torch.testing.assert_close(mixed[1], unknown[1])
    torch.testing.assert_close(mixed[0, history:], unknown[0, history:])
    assert not torch.allclose(mixed[0, 0], unknown[0, 0])


def test_a_coasting_arm_is_foretold() -> None:
    """Constant velocities, different in each row and invisible in the tokens: only the motion tells them."""
    own = domain(actions=1, state=2, targets=0)
    dynamics = model("soft", own, state_noise=0.0).requires_grad_(True).train()
    optimizer = Optimizer(dynamics, dynamics.parameter_groups(), OptimizerConfig(lr=3e-3))
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        velocity = 0.1 * torch.randn(16, 1, 2, generator=generator)
        clip = {
            "tokens": tokens("soft", 1, 1).expand(16, 6, -1, -1),
            "actions": torch.zeros(16, 5, 1),
            "agent_pos": torch.randn(16, 1, 2, generator=generator) + velocity * torch.arange(6)[:, None],
        }
        loss, _ = dynamics.loss(clip, generator)
        dynamics.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0)
    dynamics.eval()
    start = dynamics.start(clip["tokens"][:, 0], clip["agent_pos"][:, 0], torch.arange(16))
    state = dynamics.observe(start, clip["actions"][:, 0], clip["tokens"][:, 1], clip["agent_pos"][:, 1])
    after, _ = dynamics.step(state, clip["actions"][:, 1])
    error = (after.agent_pos_BP - clip["agent_pos"][:, 2]).square().mean()
    standing_still = (clip["agent_pos"][:, 1] - clip["agent_pos"][:, 2]).square().mean()
    assert error < 0.15 * standing_still
