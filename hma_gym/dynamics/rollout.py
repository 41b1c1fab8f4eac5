"""The explicit state of B rollouts, and what can be done with it: select, fork, mix, save.

Every tensor has the row first, so all operations are one index a tensor, and nothing is kept in a module.

Shape legend: B rows, S tokens of a frame, P agent_pos dims, A action dims, K steps of the body's history, D width,
X privileged target dims, O dims of the object's pose that the bodies foretell (0 where none has an object).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hma_gym.dynamics.pose import Pose, mixed_rows
from hma_gym.errors import EnvironmentState
from hma_gym.nn.transformer import Cache


@dataclass(frozen=True)
class RolloutState:
    """Everything that the next frame depends on.

    Attributes:
        tokens: the last frame's tokens, (B, S, C) float or (B, S) int64.
        agent_pos_BP: the last frame's proprioception in its own units (metres, quaternion, gripper), float32.
        targets_BO: where the object is believed to be, its pose in own units (see :class:`hma_gym.domains.Domain`).
        motions_BKP: the last K changes of agent_pos, the latest first, same units; 0 before a start, which is taken to
            be at rest.
        target_motions_BKO: those of the object's pose, likewise.
        drawn: the last frame as the bodies drew it, (B, S, C); S = C = 0 where tokens are discrete.
        actions_BKA: the actions that led to them, normalised; meaningless where ``acted_BK`` is False.
        acted_BK: bool, False before a start and where no action was given.
        keys_BLWND, values_BLWND, step_B: the cache (see :class:`hma_gym.nn.transformer.Cache`).
        seed_B: int64, the rows' seeds; with ``step_B`` they fix all random numbers.
        domain_B: int64, index of each row's domain in the model.
    """

    tokens: Tensor
    agent_pos_BP: Tensor
    targets_BO: Tensor
    motions_BKP: Tensor
    target_motions_BKO: Tensor
    drawn: Tensor
    actions_BKA: Tensor
    acted_BK: Tensor
    keys_BLWND: Tensor
    values_BLWND: Tensor
    step_B: Tensor
    seed_B: Tensor
    domain_B: Tensor

    def __len__(self) -> int:
        return len(self.step_B)

    @property
    def cache(self) -> Cache:
        """The cache part, as the trunk wants it."""
        return Cache(self.keys_BLWND, self.values_BLWND, self.step_B)

    @property
    def pose(self) -> Pose:
        """Where everything is, as the bodies want it (padded to the widest domain); a rollout starts at rest, so that
        all changes are known."""
        return Pose(
            self.agent_pos_BP,
            self.targets_BO,
            self.motions_BKP,
            self.target_motions_BKO,
            torch.ones_like(self.acted_BK),
            self.actions_BKA,
            self.acted_BK,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> RolloutState:
        """Apply one function to every tensor."""
        return RolloutState(**{f.name: function(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def clone(self) -> RolloutState:
        """A copy that shares no memory with this state."""
        return self.map(torch.clone)

    def to(self, device: torch.device | str) -> RolloutState:
        """The same state on another device."""
        return self.map(lambda x: x.to(device))

    def select(self, index_K: Tensor) -> RolloutState:
        """The rows ``index_K`` (int64), in that order, as a copy; rows may repeat."""
        return self.map(lambda x: x.index_select(0, index_K))

    def fork(self, k: int) -> RolloutState:
        """Each row k times, copies next to each other: row i becomes rows i k .. i k + k - 1, with the same seed.

        Copies that take the same actions see the same frames; use :meth:`reseed` for independent futures.
        """
        return self.map(lambda x: x.repeat_interleave(k, dim=0))

    def reseed(self, seed_B: Tensor) -> RolloutState:
        """The same situation with other random numbers ahead."""
        return dataclasses.replace(self, seed_B=seed_B.to(self.seed_B))

    def where(self, mask_B: Tensor, other: RolloutState) -> RolloutState:
        """Rows of ``other`` where the mask is True, own rows elsewhere (a partial reset), as a copy."""
        return mixed_rows(mask_B, other, self)

    def to_dict(self) -> dict[str, Tensor]:
        """Tensors by name (on the CPU), for ``save_state`` and files; the inverse of :meth:`from_dict`."""
        return {f.name: getattr(self, f.name).detach().cpu().clone() for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> RolloutState:
        """Read what :meth:`to_dict` wrote. Raises :class:`EnvironmentState` where names are missing or unknown."""
        names = {f.name for f in dataclasses.fields(cls)}
        if set(tensors) != names:
            raise EnvironmentState(
                f"state: a rollout state has the tensors {sorted(names)}, got {sorted(tensors)}; "
                "pass what save_state of the same version returned."
            )
        return cls(**{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class StepOutput:
    """What one step shows.

    Attributes:
        tokens: the new frame's tokens, (B, S, C) float or (B, S) int64; a tokenizer decodes them.
        agent_pos_BP: predicted proprioception in its own units.
        features_BD: mean of the trunk's features over the frame.
        targets_BX: predicted privileged targets in their own units (for Lift: cube position in metres).
    """

    tokens: Tensor
    agent_pos_BP: Tensor
    features_BD: Tensor
    targets_BX: Tensor
