"""One domain of a checkpoint as planners know it: bounds of its actions, and how its observations are read.

Shape legend: N environments, A action dims x stride, P agent_pos dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.rollout import RolloutState
from hma_gym.errors import EnvironmentState, InvalidArgument
from hma_gym.policies.protocol import Observation


class PlanningDomain:
    """What both kinds of :class:`~hma_gym.policies.mpc.protocol.PlanningDynamics` over a checkpoint share.

    Args:
        checkpoint: its weights are shared and never changed.
        domain: name of the domain; needed where the checkpoint has several.
        batch: rows that a step is best given at once.

    Raises:
        InvalidArgument: no domain named where there are several, or no row at once.
        UnknownName: no such domain.
    """

    def __init__(self, checkpoint: Checkpoint, domain: str | None, batch: int) -> None:
        model = checkpoint.dynamics
        if domain is None and len(model.domains) > 1:
            raise InvalidArgument(
                f"domain must name one of {[d.name for d in model.domains]}: checkpoint {checkpoint.name!r} has "
                "several."
            )
        if batch < 1:
            raise InvalidArgument(f"batch must be at least 1 row, got {batch}.")
        self.checkpoint, self.batch = checkpoint, batch
        self.index = 0 if domain is None else model.domain_index(domain)
        self.domain = model.domains[self.index]
        self.device = model.position_embedding.device

        def repeated(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values * self.domain.stride, dtype=torch.float32, device=self.device)

        self.action_low_A, self.action_high_A = repeated(self.domain.action_low), repeated(self.domain.action_high)
        self.action_mean_A, self.action_std_A = repeated(self.domain.action_mean), repeated(self.domain.action_std)

    @torch.inference_mode()
    def read(self, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """The tokens (N, S...) of the frames, and agent_pos (N, P), None where the domain has none.

        Raises:
            InvalidArgument: the observation is no dict with ``pixels``, and ``agent_pos`` where the domain has one.
        """
        needed = {"pixels", "agent_pos"} if self.domain.state_dim else {"pixels"}
        if not isinstance(observation, Mapping) or not needed <= observation.keys():
            raise InvalidArgument(
                f"planning with domain {self.domain.name!r} needs observations with {sorted(needed)}; make the "
                "environment with obs_type='pixels_agent_pos'."
            )
        frames = torch.from_numpy(np.array(observation["pixels"])).to(self.device)
        tokens = self.checkpoint.tokenizer.encode(frames).contiguous()
        if not self.domain.state_dim:
            return tokens, None
        return tokens, torch.from_numpy(np.array(observation["agent_pos"], dtype=np.float32)).to(self.device)

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """See the protocol."""
        return self.checkpoint.tokenizer.decode(tokens)

    def rollout(self, saved: Mapping[str, Any]) -> RolloutState:
        """The rollouts of learned environments of this checkpoint, from what their ``save_state`` (of a vector
        environment) or ``get_state`` returned.

        Raises:
            EnvironmentState: the state is of another checkpoint.
        """
        if saved["world"][1] != self.checkpoint.digest:
            raise EnvironmentState(
                f"state must be of checkpoint {self.checkpoint.name!r} (digest {self.checkpoint.digest[:12]}), got one "
                f"of {saved['world'][0]!r} ({saved['world'][1][:12]}); plan with the environment's own checkpoint."
            )
        names = [f.name for f in dataclasses.fields(RolloutState)]
        return RolloutState(**{name: saved["tensors"][f"rollout.{name}"].to(self.device) for name in names})
