"""A checkpoint's whole model as something to plan with, kept in step with real frames.

Each real frame is encoded and enters the model's context, so that a plan begins from what is, and not from what the
model had expected. Plans run on tokens: no frame is decoded but those that an objective asks for, and the round trips
of long rollouts (:mod:`hma_gym.dynamics.refresh`) are left out, for plans are short.

Shape legend: N environments, B rows, K copies, A action dims, P agent_pos dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.rollout import RolloutState
from hma_gym.policies.mpc.domain import PlanningDomain
from hma_gym.policies.mpc.protocol import Imagined
from hma_gym.policies.protocol import Observation


@dataclass(frozen=True)
class PlanState:
    """Rollouts, and for how many steps each has seen no real frame (int64)."""

    rollout: RolloutState
    dreamt_B: Tensor


class LearnedDynamics(PlanningDomain):
    """A :class:`~hma_gym.policies.mpc.protocol.PlanningDynamics` over one domain of a checkpoint.

    Args:
        checkpoint, domain: see :class:`~hma_gym.policies.mpc.domain.PlanningDomain`.
        batch: rows that the trunk is given at once.
    """

    def __init__(self, checkpoint: Checkpoint, domain: str | None = None, *, batch: int = 32) -> None:
        super().__init__(checkpoint, domain, batch)
        self._model = checkpoint.dynamics

    @torch.inference_mode()
    def start(self, observation: Observation) -> PlanState:
        """See the protocol; raises as :meth:`read` does."""
        tokens, agent_pos = self._padded_read(observation)
        rows = len(tokens)
        domain = torch.full((rows,), self.index, dtype=torch.int64, device=self.device)
        seeds = torch.zeros(rows, dtype=torch.int64, device=self.device)  # candidates are compared under the same luck
        return PlanState(self._model.start(tokens, agent_pos, seeds, domain), torch.zeros_like(seeds))

    @torch.inference_mode()
    def observe(
        self, state: PlanState, actions_NA: NDArray[np.float32], observation: Observation, fresh_N: NDArray[np.bool_]
    ) -> PlanState:
        """See the protocol."""
        tokens, agent_pos = self._padded_read(observation)
        actions = self._padded(torch.from_numpy(np.array(actions_NA, dtype=np.float32)).to(self.device))
        after = self._model.observe(state.rollout, actions, tokens, agent_pos)
        if fresh_N.any():
            after = after.where(torch.from_numpy(fresh_N).to(self.device), self.start(observation).rollout)
        return PlanState(after, torch.zeros_like(state.dreamt_B))

    def resume(self, saved: Mapping[str, Any]) -> PlanState:
        """The state of learned environments of this checkpoint, from what their ``save_state`` (of a vector
        environment) or ``get_state`` returned: for plans on exactly the state that the environments are in.

        Raises:
            EnvironmentState: the state is of another checkpoint.
        """
        rollout = self.rollout(saved)
        return PlanState(rollout, rollout.step_B.clone())

    @torch.inference_mode()
    def fork(self, state: PlanState, k: int) -> PlanState:
        """See the protocol."""
        return PlanState(state.rollout.fork(k), state.dreamt_B.repeat_interleave(k))

    @torch.inference_mode()
    def step(self, state: PlanState, actions_BA: Tensor) -> tuple[PlanState, Imagined]:
        """See the protocol."""
        rollout, out = self._model.step(state.rollout, self._padded(actions_BA), in_place=True)
        dreamt_B, score = state.dreamt_B + 1, self.checkpoint.uncertainty
        return PlanState(rollout, dreamt_B), Imagined(
            lambda: out.tokens,
            out.agent_pos_BP[:, : self.domain.state_dim],
            out.features_BD,
            out.targets_BX[:, : self.domain.target_dim],
            torch.zeros(len(dreamt_B), device=self.device) if score is None else score(out.features_BD, dreamt_B),
        )

    def _padded_read(self, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """As :meth:`read`, agent_pos padded to the widest domain."""
        tokens, agent_pos = self.read(observation)
        if agent_pos is None:
            return tokens, None
        return tokens, F.pad(agent_pos, (0, self._model.state_size - agent_pos.shape[1]))

    def _padded(self, actions_BA: Tensor) -> Tensor:
        return F.pad(actions_BA, (0, self._model.action_size - actions_BA.shape[1]))
