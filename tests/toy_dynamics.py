"""Two-layer dynamics models of either kind, for the tests of dynamics: random weights, or trained for seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hma_gym.domains import Domain
from hma_gym.dynamics.coast import ManipulationCoast
from hma_gym.dynamics.mar import FlowHeadConfig
from hma_gym.dynamics.maskgit import MaskGITHeadConfig
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.dynamics.rollout import RolloutState, StepOutput
from hma_gym.nn.rotations import columns_of_matrix, matrix_of_columns
from hma_gym.nn.transformer import TrunkConfig
from hma_gym.training import Optimizer, OptimizerConfig

TRUNK = TrunkConfig(layers=2, width=32, heads=2, window=4, mlp_ratio=2.0)
SOFT = FlowHeadConfig((4, 4), channels=3, patch=2, change_scale=0.5, flow_width=16, flow_layers=1, flow_steps=2)
VQ = MaskGITHeadConfig((4, 4), vocabulary=(4, 3), patch=2)
HEADS = {"soft": SOFT, "vq": VQ}


def domain(
    name: str = "arm", actions: int = 3, state: int = 2, targets: int = 1, stride: int = 1, object_turns: int = 0
) -> Domain:
    """A domain whose statistics are not trivial."""

    def numbers(count: int, low: float, step: float) -> tuple[float, ...]:
        return tuple(low + step * i for i in range(count))

    return Domain(
        name,
        action_dim=actions,
        action_low=(-1.0,) * actions,
        action_high=(1.0,) * actions,
        action_mean=numbers(actions, 0.1, 0.05),
        action_std=numbers(actions, 0.5, 0.1),
        state_dim=state,
        state_mean=numbers(state, -0.2, 0.3),
        state_std=numbers(state, 1.0, 0.5),
        delta_std=numbers(state, 0.1, 0.05),
        target_dim=targets,
        target_mean=numbers(targets, 0.5, 0.1),
        target_std=numbers(targets, 2.0, 0.5),
        object_turns=object_turns,
        stride=stride,
    )


def handling(name: str = "hand", **fields: Any) -> Domain:
    """A domain with an object, in metres: its pose is the targets, and agent_pos is a hand's pose and two fingers."""
    own = domain(name, **{"actions": 4, "state": 9, "targets": 9, "object_turns": 4, **fields})
    return dataclasses.replace(
        own,
        state_mean=(0.1, -0.1, 0.2, 0.7, 0.7, 0.1, 0.0, 0.02, -0.02),
        state_std=(0.1, 0.12, 0.15, 0.3, 0.3, 0.2, 0.2, 0.02, 0.02),
        delta_std=(0.01, 0.012, 0.015, 0.03, 0.03, 0.02, 0.02, 0.002, 0.002),
        target_mean=(0.1, -0.1, 0.15, 0.9, 0.0, 0.0, 0.0, 0.9, 0.0),
        target_std=(0.1, 0.1, 0.05) + (0.3,) * 6,
    )


def model(kind: str = "soft", *domains: Domain, trunk: TrunkConfig = TRUNK, seed: int = 0, **fields: Any) -> Dynamics:
    """Random weights, none of them zero, so that every input has its effect."""
    head = fields.pop("head", HEADS[kind])
    torch.manual_seed(seed)
    dynamics = Dynamics(DynamicsConfig(trunk, head, **fields), domains or (domain(),))
    for parameter in dynamics.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for index in range(len(dynamics.domains)):
        body = dynamics.adapter(index).body
        if isinstance(body.coast, ManipulationCoast):  # in part it stays, in part it is held, in part it falls
            body.coast.handling[-1].weight.data[-3:] *= 0.1  # type: ignore[operator,union-attr]
            body.coast.handling[-1].bias.data[-3:] = 0.0  # type: ignore[operator,union-attr]
            body.coast.set_floor(0.0)
    return dynamics.eval().requires_grad_(False)


def tokens(kind: str, *shape: int, seed: int = 1) -> Tensor:
    """Random tokens (*shape, S...) of the toy grid."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "soft":
        return torch.randn(*shape, 16, SOFT.channels, generator=generator)
    return torch.randint(12, (*shape, 16), generator=generator)


def batch(kind: str, dynamics: Dynamics, rows: int, frames: int, seed: int = 1) -> dict[str, Tensor]:
    """A random training batch; the rows go through the domains in turn, padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(rows) % len(dynamics.domains)
    result = {
        "tokens": tokens(kind, rows, frames + 1, seed=seed),
        "actions": torch.rand(rows, frames, dynamics.action_size, generator=generator),
        "agent_pos": torch.randn(rows, frames + 1, dynamics.state_size, generator=generator),
        "targets": torch.randn(rows, frames + 1, dynamics.target_size, generator=generator),
        "domain": index,
    }
    for row, i in enumerate(index.tolist()):
        owner = dynamics.domains[i]
        result["actions"][row, :, owner.action_dim * owner.stride :] = 0
        result["agent_pos"][row, :, owner.state_dim :] = 0
        result["targets"][row, :, owner.target_dim :] = 0
        if owner.object_turns:
            thing = result["targets"][row]
            thing[:, 3:9] = columns_of_matrix(matrix_of_columns(thing[:, 3:9]))
            thing[:, :3] *= 0.1
            result["agent_pos"][row, :, :3] *= 0.1
    return result


def rollout(dynamics: Dynamics, state: RolloutState, actions: Tensor) -> Iterator[tuple[RolloutState, StepOutput]]:
    """States and outputs under actions (B, T, A)."""
    for t in range(actions.shape[1]):
        state, out = dynamics.step(state, actions[:, t])
        yield state, out


def begin(dynamics: Dynamics, clip: dict[str, Tensor], seeds: Tensor | None = None) -> RolloutState:
    """Rollouts from the first frames of a batch."""
    rows = len(clip["tokens"])
    return dynamics.start(
        clip["tokens"][:, 0],
        clip["agent_pos"][:, 0],
        torch.arange(rows) if seeds is None else seeds,
        domain=clip["domain"],
    )


def fit(dynamics: Dynamics, batches: Iterator[dict[str, Tensor]], steps: int, lr: float = 3e-3) -> list[float]:
    """Train with AdamW; returns the losses."""
    dynamics.train().requires_grad_(True)
    optimizer = Optimizer(dynamics, dynamics.parameter_groups(), OptimizerConfig(lr=lr, weight_decay=0.0))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        loss, _ = dynamics.loss(next(batches), generator)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(dynamics.parameters(), 1.0)
        optimizer.step(1.0 - step / steps)
        losses.append(float(loss.detach()))
    dynamics.eval().requires_grad_(False)
    return losses


def same(a: RolloutState, b: RolloutState) -> bool:
    """Whether two states are equal to the last bit."""
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(RolloutState))
