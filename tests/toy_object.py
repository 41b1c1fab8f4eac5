"""A hand that carries what its closed fingers are at, drawn in four tokens: what the tests of objects train on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from toy_dynamics import handling

#: Actions are a hand's change of position (cm) and of yaw; the fingers stay as they are.
OWN = dataclasses.replace(
    handling(actions=4),
    action_mean=(0.0,) * 4,
    action_std=(1.0,) * 4,
    state_mean=(0.0,) * 9,
    state_std=(0.1,) * 3 + (0.5,) * 4 + (0.02,) * 2,
    delta_std=(0.01,) * 3 + (0.05,) * 4 + (0.01,) * 2,
    target_mean=(0.0, 0.0, 0.0, 0.7, 0.0, 0.0, 0.0, 0.7, 0.0),
    target_std=(0.1,) * 3 + (0.5,) * 6,
)
TOKENS = (2, 2, 3)  # rows, columns, channels


def turn(angle: Tensor) -> Tensor:
    """(...) -> (..., 3, 3), about the upright axis."""
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack((c, -s, zero, s, c, zero, zero, zero, one), dim=-1).unflatten(-1, (3, 3))


def columns(angle: Tensor) -> Tensor:
    """(...) -> (..., 6), the first two columns of that matrix."""
    return turn(angle).mT[..., :2, :].flatten(-2)


def drawn(hand: Tensor, thing: Tensor) -> Tensor:
    """Tokens (..., 4, 3) that show where the hand is, and near the thing its place and its yaw (up to a quarter of a
    turn)."""
    yaw = 4.0 * torch.atan2(thing[..., 4], thing[..., 3])
    told = torch.cat((10.0 * thing[..., :3], yaw.cos()[..., None], yaw.sin()[..., None]), dim=-1)
    generator = torch.Generator().manual_seed(0)
    of_hand, of_thing = (torch.randn(n, 12, generator=generator, dtype=told.dtype) for n in (3, 5))
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]], dtype=told.dtype)
    away = (corners - 5.0 * thing[..., None, :2]).square().sum(dim=-1, keepdim=True)
    shown = torch.exp(-away / 8.0) * (told @ of_thing).unflatten(-1, (4, 3))
    return (10.0 * hand[..., :3] @ of_hand).unflatten(-1, (4, 3)) + shown


def handled(rows: int, frames: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A batch for ``Body.loss``, and which rows carry the thing, (B,) bool."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    near, closed = torch.rand(rows, generator=generator) < 0.5, torch.rand(rows, generator=generator) < 0.5
    held = near & closed
    actions = normal(rows, frames, 4)
    moved = torch.cat((torch.zeros(rows, 1, 4), actions.cumsum(dim=1)), dim=1)
    hand = 0.1 * normal(rows, 1, 3) + 0.01 * moved[..., :3]
    yaw = 0.5 * normal(rows, 1) + 0.05 * moved[..., 3]
    nothing = torch.zeros(rows, frames + 1)
    quaternion = torch.stack((nothing, nothing, (yaw / 2).sin(), (yaw / 2).cos()), dim=-1)
    finger = torch.where(closed, 0.01, 0.04)[:, None, None].expand(-1, frames + 1, 1)
    away = normal(rows, 1, 3)
    away = away / away.norm(dim=-1, keepdim=True) * torch.where(near, 0.008, 0.08)[:, None, None]
    carried = hand + (turn(yaw - yaw[:, :1]) @ away[..., None])[..., 0]
    place = torch.where(held[:, None, None], carried, (hand + away)[:, :1])
    turned = 3.0 * normal(rows, 1) + torch.where(held[:, None], yaw - yaw[:, :1], 0.0)
    agent_pos = torch.cat((hand, quaternion, finger, -finger), dim=-1)
    targets = torch.cat((place, columns(turned)), dim=-1)
    # Single frames: in a third of them the thing lies somewhere else, as it does while a hand comes.
    elsewhere = torch.arange(rows)[:, None] % 3 == 0
    lying = torch.where(elsewhere, targets[:, -1].roll(1, dims=0), targets[:, -1])
    batch = {
        "agent_pos": agent_pos,
        "targets": targets,
        "actions": actions,
        "at_rest": torch.ones(rows, dtype=torch.bool),
        "poses": agent_pos[:, -1],
        "places": lying,
        "tokens": drawn(agent_pos[:, -1], lying),
    }
    return batch, held
