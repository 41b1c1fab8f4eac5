"""Where the robot is, and the object where there is one, with the recent past that tells how they move.

Shape legend: B rows, T frames, K steps of history, P agent_pos dims, X dims of the object's pose (0 without one), A
action dims x stride.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

RowsT = TypeVar("RowsT")


def mixed_rows(mask_B: Tensor, there: RowsT, elsewhere: RowsT) -> RowsT:
    """Rows of the one dataclass of tensors (B, ...) where the mask is True, of the other elsewhere, as a copy."""
    mixed: dict[str, Any] = {}
    for field in dataclasses.fields(there):  # type: ignore[arg-type]
        new, own = getattr(there, field.name), getattr(elsewhere, field.name)
        mixed[field.name] = torch.where(mask_B.view(-1, *(1,) * (own.ndim - 1)), new, own)
    return type(there)(**mixed)


@dataclass(frozen=True)
class Pose:
    """Before some frames; leading dims (...) are equal.

    Attributes:
        agent_pos: (..., P), own units.
        targets: (..., X), the object's pose (see :class:`hma_gym.domains.Domain`), own units.
        motions: (..., K, P), the last changes of agent_pos, own units, the latest first.
        target_motions: (..., K, X), those of the targets.
        known: (..., K) bool, False where a change is not known: before the first frame of a clip inside an episode.
        actions: (..., K, A), the normalised actions that led to these changes.
        acted: (..., K) bool, False where no such action is known.
    """

    agent_pos: Tensor
    targets: Tensor
    motions: Tensor
    target_motions: Tensor
    known: Tensor
    actions: Tensor
    acted: Tensor

    def rows(self, rows: Tensor | slice | tuple[slice, int | None]) -> Pose:
        """Of some rows only, by an index of the leading dims."""
        return Pose(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def narrowed(self, state_dim: int, target_dim: int, action_size: int) -> Pose:
        """Without the padding of narrower domains."""
        return dataclasses.replace(
            self,
            agent_pos=self.agent_pos[..., :state_dim],
            targets=self.targets[..., :target_dim],
            motions=self.motions[..., :state_dim],
            target_motions=self.target_motions[..., :target_dim],
            actions=self.actions[..., :action_size],
        )

    def after(self, agent_pos: Tensor, targets: Tensor, action: Tensor, given: Tensor) -> Pose:
        """One step on: the new agent_pos (..., P) and targets (..., X), and the normalised action (..., A), given or
        not, that led there."""

        def onto(latest: Tensor, past: Tensor, dim: int) -> Tensor:
            return torch.cat((latest.unsqueeze(dim), past.narrow(dim, 0, past.shape[dim] - 1)), dim=dim)

        return Pose(
            agent_pos,
            targets,
            onto(agent_pos - self.agent_pos, self.motions, -2),
            onto(targets - self.targets, self.target_motions, -2),
            onto(torch.ones_like(self.known[..., 0]), self.known, -1),
            onto(action, self.actions, -2),
            onto(given, self.acted, -1),
        )


def first_pose(agent_pos: Tensor, targets: Tensor, history: int, action_size: int, at_rest: Tensor) -> Pose:
    """The pose at a first frame: ``at_rest`` (...) bool says that nothing moved before; otherwise that is unknown."""
    lead = agent_pos.shape[:-1]
    return Pose(
        agent_pos,
        targets,
        agent_pos.new_zeros(*lead, history, agent_pos.shape[-1]),
        targets.new_zeros(*lead, history, targets.shape[-1]),
        at_rest[..., None].expand(*lead, history),
        agent_pos.new_zeros(*lead, history, action_size),
        torch.zeros(*lead, history, dtype=torch.bool, device=agent_pos.device),
    )


def clip_poses(
    agent_pos_BTP: Tensor,
    targets_BTX: Tensor,
    actions_BTA: Tensor,
    given_BT: Tensor,
    history: int,
    at_rest_B: Tensor,
) -> Pose:
    """The poses of all frames of a clip, as stepping through it would give them.

    Args:
        agent_pos_BTP, targets_BTX: at each frame.
        actions_BTA: normalised, the action taken at each frame; ``given_BT`` False hides it.
        history: K.
        at_rest_B: whether nothing moved before the first frame.
    """
    T = agent_pos_BTP.shape[1]
    time = torch.arange(T, device=agent_pos_BTP.device)

    def late(rows_BTE: Tensor, lag: int) -> Tensor:
        return F.pad(rows_BTE, (0, 0, lag, 0))[:, :T]

    def motions(rows_BTE: Tensor) -> Tensor:
        change = rows_BTE[:, 1:] - rows_BTE[:, :-1]
        return torch.stack([late(change, lag) for lag in lags], dim=2)

    lags = range(1, history + 1)
    return Pose(
        agent_pos_BTP,
        targets_BTX,
        motions(agent_pos_BTP),
        motions(targets_BTX),
        torch.stack([(time >= lag) | at_rest_B[:, None] for lag in lags], dim=2),
        torch.stack([late(actions_BTA, lag) for lag in lags], dim=2),
        torch.stack([F.pad(given_BT, (lag, 0))[:, :T] for lag in lags], dim=2),
    )
