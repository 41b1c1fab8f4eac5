"""A checkpoint's dynamics as something to plan with, kept in step with real frames.

Each real frame is encoded and enters the model's context, so that a plan begins from what is, and not from what the
model had expected. Plans run on tokens: no frame is decoded but those that an objective asks for, and the round trips
of long rollouts (:mod:`hma_gym.dynamics.refresh`) are left out, for plans are short.

Shape legend: N environments, B rows, K copies, A action dims, P agent_pos dims.
"""

from __future__ import annotations

import dataclasses
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
from hma_gym.errors import EnvironmentState, InvalidArgument
from hma_gym.policies.mpc.protocol import Imagined
from hma_gym.policies.protocol import Observation


@dataclass(frozen=True)
class PlanState:
    """Rollouts, and for how many steps each has seen no real frame (int64)."""

    rollout: RolloutState
    dreamt_B: Tensor


class LearnedDynamics:
    """A :class:`~hma_gym.policies.mpc.protocol.PlanningDynamics` over one domain of a checkpoint.

    Args:
        checkpoint: its weights are shared and never changed.
        domain: name of the domain; needed where the checkpoint has several.

    Raises:
        InvalidArgument: no domain named where there are several.
        UnknownName: no such domain.
    """

    def __init__(self, checkpoint: Checkpoint, domain: str | None = None) -> None:
        model = checkpoint.dynamics
        if domain is None and len(model.domains) > 1:
            raise InvalidArgument(
                f"domain must name one of {[d.name for d in model.domains]}: checkpoint {checkpoint.name!r} has "
                "several."
            )
        self.checkpoint = checkpoint
        self._model = model
        self._index = 0 if domain is None else model.domain_index(domain)
        self.domain = model.domains[self._index]
        self.device = model.position_embedding.device

        def repeated(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values * self.domain.stride, dtype=torch.float32, device=self.device)

        self.action_low_A, self.action_high_A = repeated(self.domain.action_low), repeated(self.domain.action_high)
        self.action_mean_A, self.action_std_A = repeated(self.domain.action_mean), repeated(self.domain.action_std)

    @torch.inference_mode()
    def start(self, observation: Observation) -> PlanState:
        """See the protocol.

        Raises:
            InvalidArgument: the observation is no dict with ``pixels``, and ``agent_pos`` where the domain has one.
        """
        tokens, agent_pos = self._read(observation)
        rows = len(tokens)
        domain = torch.full((rows,), self._index, dtype=torch.int64, device=self.device)
        seeds = torch.zeros(rows, dtype=torch.int64, device=self.device)  # candidates are compared under the same luck
        return PlanState(self._model.start(tokens.contiguous(), agent_pos, seeds, domain), torch.zeros_like(seeds))

    @torch.inference_mode()
    def observe(
        self, state: PlanState, actions_NA: NDArray[np.float32], observation: Observation, fresh_N: NDArray[np.bool_]
    ) -> PlanState:
        """See the protocol."""
        tokens, agent_pos = self._read(observation)
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
        if saved["world"][1] != self.checkpoint.digest:
            raise EnvironmentState(
                f"state must be of checkpoint {self.checkpoint.name!r} (digest {self.checkpoint.digest[:12]}), got one "
                f"of {saved['world'][0]!r} ({saved['world'][1][:12]}); plan with the environment's own checkpoint."
            )
        names = [f.name for f in dataclasses.fields(RolloutState)]
        rollout = RolloutState(**{name: saved["tensors"][f"rollout.{name}"].to(self.device) for name in names})
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
            out.tokens,
            out.agent_pos_BP[:, : self.domain.state_dim],
            out.features_BD,
            out.targets_BX[:, : self.domain.target_dim],
            torch.zeros(len(dreamt_B), device=self.device) if score is None else score(out.features_BD, dreamt_B),
        )

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """See the protocol."""
        return self.checkpoint.tokenizer.decode(tokens)

    def _read(self, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """Tokens, and agent_pos padded to the widest domain."""
        needed = {"pixels", "agent_pos"} if self.domain.state_dim else {"pixels"}
        if not isinstance(observation, Mapping) or not needed <= observation.keys():
            raise InvalidArgument(
                f"planning with domain {self.domain.name!r} needs observations with {sorted(needed)}; make the "
                "environment with obs_type='pixels_agent_pos'."
            )
        frames = torch.from_numpy(np.array(observation["pixels"])).to(self.device)
        tokens = self.checkpoint.tokenizer.encode(frames)
        if not self.domain.state_dim:
            return tokens, None
        agent_pos = torch.from_numpy(np.array(observation["agent_pos"], dtype=np.float32)).to(self.device)
        return tokens, F.pad(agent_pos, (0, self._model.state_size - agent_pos.shape[1]))

    def _padded(self, actions_BA: Tensor) -> Tensor:
        return F.pad(actions_BA, (0, self._model.action_size - actions_BA.shape[1]))
