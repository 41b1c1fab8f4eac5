"""What planning needs of a dynamics model, and what it sees of the futures of its candidates.

A planner never touches an environment: it is given observations, keeps a state of its own in step with them, and tries
its candidates on forks of that state.

Shape legend: N environments, K candidates of each, B rows (N x K), H steps of a plan, A action dims, S C tokens of a
frame, D feature width, P agent_pos dims, X privileged target dims, F frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hma_gym.policies.protocol import Observation

StateT = TypeVar("StateT")
GivenStateT = TypeVar("GivenStateT", contravariant=True)


@dataclass(frozen=True)
class Imagined:
    """One imagined step of B rows.

    Attributes:
        show: the new frame's tokens, (B, S, C) float or (B, S) int64; a model that foretells without them draws them
            when they are asked for.
        agent_pos_BP: predicted proprioception, own units.
        features_BD: mean of the model's features over the frame; D may be 0.
        targets_BX: predicted privileged targets, own units (for Lift the cube's position, metres, and its rotation
            where the model knows it); X may be 0.
        uncertainty_B: how far this step may be wrong, 0 to 1; zeros where the model does not tell.
    """

    show: Callable[[], Tensor]
    agent_pos_BP: Tensor
    features_BD: Tensor
    targets_BX: Tensor
    uncertainty_B: Tensor

    @property
    def tokens(self) -> Tensor:
        """The new frame's, drawn now where they are."""
        return self.show()


@dataclass(frozen=True)
class Futures:
    """What becomes of B candidate plans, step by step; nothing is drawn or decoded before it is asked for.

    Attributes:
        actions_BHA: the plans.
        shows: the tokens of the H steps, see :class:`Imagined`.
        agent_pos_BHP, features_BHD, targets_BHX, uncertainty_BH: see there, with H after B.
        decode: tokens (B, S...) to frames (B, height, width, 3) uint8.
    """

    actions_BHA: Tensor
    shows: Sequence[Callable[[], Tensor]]
    agent_pos_BHP: Tensor
    features_BHD: Tensor
    targets_BHX: Tensor
    uncertainty_BH: Tensor
    decode: Callable[[Tensor], Tensor]

    @property
    def tokens(self) -> Tensor:
        """Of all steps, (B, H, S...)."""
        return self.window(len(self.shows))

    def frames(self, last: int) -> Tensor:
        """The last F = ``last`` frames of every plan, decoded: (B, F, height, width, 3) uint8.

        Of a plan shorter than that, the first imagined frame stands for those before it.
        """
        tokens = self.window(last)
        return self.decode(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])

    def agent_pos(self, last: int) -> Tensor:
        """agent_pos of these frames, (B, F, P)."""
        felt_BFP = self.agent_pos_BHP[:, -last:]
        missing = last - felt_BFP.shape[1]
        return torch.cat([felt_BFP[:, :1].expand(-1, missing, -1), felt_BFP], dim=1)

    def window(self, last: int) -> Tensor:
        """The tokens of these frames, (B, F, S...)."""
        shown = [show() for show in self.shows[-last:]]
        return torch.stack([shown[0]] * (last - len(shown)) + shown, dim=1)


class PlanningDynamics(Protocol[StateT]):
    """A model to plan with. States are explicit, and only :meth:`step` gives up the one that it is handed.

    Attributes:
        action_low_A, action_high_A: bounds of an action.
        action_mean_A, action_std_A: of the actions that the model knows: where a search begins, and how far it reaches.
        batch: rows that :meth:`step` is best given at once.
    """

    action_low_A: Tensor
    action_high_A: Tensor
    action_mean_A: Tensor
    action_std_A: Tensor
    batch: int

    def start(self, observation: Observation) -> StateT:
        """The state of N environments that show these first observations."""
        ...

    def observe(
        self, state: StateT, actions_NA: NDArray[np.float32], observation: Observation, fresh_N: NDArray[np.bool_]
    ) -> StateT:
        """One step of the real environments: the actions that were carried out and what was seen then.

        Environments where ``fresh_N`` is true have begun a new episode with this observation.
        """
        ...

    def fork(self, state: StateT, k: int) -> StateT:
        """A copy with each row k times, next to each other."""
        ...

    def step(self, state: StateT, actions_BA: Tensor) -> tuple[StateT, Imagined]:
        """One imagined step; ``state`` must not be used again."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, S...) to frames (B, height, width, 3) uint8."""
        ...


Objective = Callable[[Futures], Tensor]
"""The value of each plan, (B,) float, higher is better: any function of the futures."""


class Proposer(Protocol[GivenStateT]):
    """Candidates that do not come from noise."""

    def propose(self, state: GivenStateT, before: Observation | None, observation: Observation, step: int) -> Tensor:
        """Plans (N, K, H, A) from here.

        Args:
            state: of the N environments; it is not changed.
            before: the observation before this one; None at the first.
            observation: the present one.
            step: how often was asked before; with the proposer's seeds it decides all random numbers.
        """
        ...
