"""A checkpoint's body alone as something to plan with: thousands of candidates where the whole model tries a few.

A model whose domain has an object foretells hand and object with a network so small that a step costs microseconds (see
:mod:`hma_gym.dynamics.body`). Plans that are judged by poses need no more. A frame is drawn when it is asked for, and
shows what the body knows: the robot, the object and what stands still.

Each real frame is encoded, and the object's place is read off its tokens, so that a plan begins from what is. But the
body often knows better: of an object in the hand a small frame shows little, and what it shows may be misread for as
long as the hand stays there. Such a one is read only once the fingers do what the body did not foretell.

Shape legend: N environments, B rows, K copies, A action dims, P agent_pos dims, X dims of the object's pose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.coast import PLACE, ManipulationCoast
from hma_gym.dynamics.pose import Pose, first_pose, mixed_rows
from hma_gym.errors import CheckpointError
from hma_gym.policies.mpc.domain import PlanningDomain
from hma_gym.policies.mpc.protocol import Imagined
from hma_gym.policies.protocol import Observation

#: Dims of agent_pos after the hand's pose.
FINGERS = slice(7, None)

#: How far a reading moves the belief: by this share of its distance.
TRUST = 0.3

#: An object so far (m) above where objects lie is held or falls, and is read only if a finger is so far (m) from where
#: it was foretold.
ALOFT, SURPRISE = 0.01, 0.001


class BodyDynamics(PlanningDomain):
    """A :class:`~hma_gym.policies.mpc.protocol.PlanningDynamics` over the body of one domain; its states are poses.

    Features have no dims, and the uncertainty is zero: the calibrated one is made of the trunk's features.

    Args:
        checkpoint, domain: see :class:`~hma_gym.policies.mpc.domain.PlanningDomain`.
        batch: rows that the body is given at once.

    Raises:
        CheckpointError: the domain has no object.
    """

    def __init__(self, checkpoint: Checkpoint, domain: str | None = None, *, batch: int = 1024) -> None:
        super().__init__(checkpoint, domain, batch)
        self._adapter = checkpoint.dynamics.adapter(self.index)
        self._body = self._adapter.body
        if not self._body.target_dim:
            raise CheckpointError(
                f"checkpoint {checkpoint.name!r} knows no object in domain {self.domain.name!r} (its object_turns are "
                f"{self.domain.object_turns}), and a body alone plans on one; plan on the whole model "
                "(LearnedDynamics, or dynamics='model'), or train a model with object_turns above 0."
            )

    @torch.inference_mode()
    def start(self, observation: Observation) -> Pose:
        """See the protocol; raises as :meth:`read` does."""
        tokens, agent_pos = self._frame(observation)
        at_rest = torch.ones(len(tokens), dtype=torch.bool, device=self.device)
        targets = self._body.sighted(tokens, agent_pos, None)
        return first_pose(agent_pos, targets, self._body.config.history, len(self.action_mean_A), at_rest)

    @torch.inference_mode()
    def observe(
        self, state: Pose, actions_NA: NDArray[np.float32], observation: Observation, fresh_N: NDArray[np.bool_]
    ) -> Pose:
        """See the protocol."""
        tokens, agent_pos = self._frame(observation)
        action = self._adapter.normalise_action(
            torch.from_numpy(np.array(actions_NA, dtype=np.float32)).to(self.device)
        )
        given = torch.ones(len(tokens), dtype=torch.bool, device=self.device)
        foretold, believed = self._body.coasted(state, action, given)
        along = self._taken_along(state, foretold, believed, agent_pos)
        believed = believed + F.pad(along, (0, believed.shape[1] - along.shape[1]))
        after = state.after(agent_pos, believed, action, given)  # that it was believed elsewhere is no motion
        surprised = ((agent_pos - foretold)[:, FINGERS].abs() > SURPRISE).any(dim=1, keepdim=True)
        told = self._body.sighted(tokens, agent_pos, believed) - believed
        share = TRUST * (surprised | ~self._aloft(believed))
        after = dataclasses.replace(after, targets=believed + share * told)
        if fresh_N.any():
            after = mixed_rows(torch.from_numpy(fresh_N).to(self.device), self.start(observation), after)
        return after

    def resume(self, saved: Mapping[str, Any]) -> Pose:
        """The poses in learned environments of this checkpoint, from what their ``save_state`` (of a vector
        environment) or ``get_state`` returned.

        Raises:
            EnvironmentState: the state is of another checkpoint.
        """
        pose = self.rollout(saved).pose
        return pose.narrowed(self.domain.state_dim, self._body.target_dim, len(self.action_mean_A))

    @torch.inference_mode()
    def fork(self, state: Pose, k: int) -> Pose:
        """See the protocol."""
        return state.rows(torch.arange(len(state.agent_pos), device=self.device).repeat_interleave(k))

    @torch.inference_mode()
    def step(self, state: Pose, actions_BA: Tensor) -> tuple[Pose, Imagined]:
        """See the protocol."""
        action, body = self._adapter.normalise_action(actions_BA), self._body
        given = torch.ones(len(action), dtype=torch.bool, device=self.device)
        agent_pos, targets = body.coasted(state, action, given)

        @torch.inference_mode()
        def show() -> Tensor:
            tokens = body.drawn(agent_pos, targets)
            assert tokens is not None  # an object is seen in soft tokens only, and those are drawn
            return tokens

        nothing = agent_pos.new_zeros(len(action), 0)
        imagined = Imagined(show, agent_pos, nothing, targets, torch.zeros(len(action), device=self.device))
        return state.after(agent_pos, targets, action, given), imagined

    def _taken_along(self, state: Pose, foretold: Tensor, believed: Tensor, agent_pos: Tensor) -> Tensor:
        """(N, 3): an object that goes with the hand is where the hand went, not where that was foretold to go."""
        hand, thing = (foretold - state.agent_pos)[:, PLACE], (believed - state.targets)[:, PLACE]
        moved, stayed_behind = thing.norm(dim=-1, keepdim=True), (thing - hand).norm(dim=-1, keepdim=True)
        return moved / (moved + stayed_behind + 1e-4) * (agent_pos - foretold)[:, PLACE]

    def _aloft(self, targets: Tensor) -> Tensor:
        """(N, 1) bool; False for a body that does not know where objects lie."""
        coast = self._body.coast
        assert isinstance(coast, ManipulationCoast)
        floor = coast.get_buffer("floor")
        return (targets[:, 2:3] > floor + ALOFT) & floor.isfinite()

    def _frame(self, observation: Observation) -> tuple[Tensor, Tensor]:
        tokens, agent_pos = self.read(observation)
        assert agent_pos is not None  # a domain with an object has a hand
        return tokens, agent_pos
