"""A checkpoint's body alone as something to plan with: thousands of candidates where the whole model tries a few.

A model whose domain has an object foretells hand and object with a network so small that a step costs microseconds (see
:mod:`hma_gym.dynamics.body`). Plans that are judged by poses need no more. A frame is drawn when it is asked for, and
shows what the body knows: the robot, the object and what stands still.

Each real frame is encoded, and the object's place is read off its tokens, so that a plan begins from what is (see
:meth:`hma_gym.dynamics.body.Body.observed`).

Shape legend: N environments, B rows, K copies, A action dims, P agent_pos dims, X dims of the object's pose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.pose import Pose, first_pose, mixed_rows
from hma_gym.errors import CheckpointError
from hma_gym.policies.mpc.domain import PlanningDomain
from hma_gym.policies.mpc.protocol import Imagined
from hma_gym.policies.protocol import Observation


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
        after = self._body.observed(state, action, given, tokens, agent_pos)
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

    def _frame(self, observation: Observation) -> tuple[Tensor, Tensor]:
        tokens, agent_pos = self.read(observation)
        assert agent_pos is not None  # a domain with an object has a hand
        return tokens, agent_pos
