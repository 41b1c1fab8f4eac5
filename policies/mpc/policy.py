"""Model predictive control as a policy: it plans on the model, in any environment.

    dynamics = BodyDynamics(load_checkpoint("lift-64"))
    policy = MPCPolicy(dynamics, ReachAndLift(), ICEM(), seeds=[0])
    policy.reset(np.array([True]))
    actions_NHA = policy.act(observation)  # of HMA-Lift-v0 or GroundTruth-Lift-v0 alike

Shape legend: N environments, K candidates, H steps of a plan, A action dims.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hma_gym.errors import EnvironmentState, InvalidArgument
from hma_gym.policies.mpc.planners import Plan, Planner, Problem, first_plan
from hma_gym.policies.mpc.protocol import Futures, Imagined, Objective, PlanningDynamics, Proposer, StateT
from hma_gym.policies.protocol import Observation


@dataclass
class PlanningRate:
    """How fast was planned.

    Attributes:
        plans: plans made, one for each environment and time.
        candidates: plans tried.
        seconds: wall time of planning, frames read included.
    """

    plans: int = 0
    candidates: int = 0
    seconds: float = 0.0


@torch.inference_mode()
def imagine(dynamics: PlanningDynamics[StateT], state: StateT, actions_BHA: Tensor) -> Futures:
    """Carry out B plans on a state of B rows, which is given up."""
    steps: list[Imagined] = []
    for h in range(actions_BHA.shape[1]):
        state, imagined = dynamics.step(state, actions_BHA[:, h])
        steps.append(imagined)
    return Futures(
        actions_BHA,
        [step.show for step in steps],
        torch.stack([step.agent_pos_BP for step in steps], dim=1),
        torch.stack([step.features_BD for step in steps], dim=1),
        torch.stack([step.targets_BX for step in steps], dim=1),
        torch.stack([step.uncertainty_B for step in steps], dim=1),
        dynamics.decode,
    )


def plan_values(dynamics: PlanningDynamics[StateT], state: StateT, objective: Objective, plans_NKHA: Tensor) -> Tensor:
    """The values (N, K) of plans tried on forks of a state of N rows, about as many rows at once as suit the model."""
    parts = []
    for plans in plans_NKHA.split(max(1, dynamics.batch // len(plans_NKHA)), dim=1):
        futures = imagine(dynamics, dynamics.fork(state, plans.shape[1]), plans.flatten(0, 1))
        parts.append(objective(futures).unflatten(0, plans.shape[:2]))
    return torch.cat(parts, dim=1)


class MPCPolicy(Generic[StateT]):
    """A :class:`~hma_gym.policies.protocol.WatchingPolicy` that plans anew every few steps.

    Args:
        dynamics: what it plans with.
        objective: what a plan is worth.
        planner: how it searches.
        seeds: one for each of the N environments; episode k of environment n draws from ``(seeds[n], k)``.
        horizon: H, steps of a plan.
        execute: how many of them are carried out before the next plan.
        proposer: candidates from elsewhere, beside the planner's own.

    Raises:
        InvalidArgument: an argument breaks its rule.
    """

    def __init__(
        self,
        dynamics: PlanningDynamics[StateT],
        objective: Objective,
        planner: Planner,
        seeds: Sequence[int],
        *,
        horizon: int = 12,
        execute: int = 3,
        proposer: Proposer[StateT] | None = None,
    ) -> None:
        if not seeds:
            raise InvalidArgument("seeds must hold one seed per environment, got none.")
        if not 1 <= execute <= horizon:
            raise InvalidArgument(f"planning needs 1 <= execute <= horizon, got execute={execute}, horizon={horizon}.")
        self.dynamics, self.objective, self.planner = dynamics, objective, planner
        self.horizon, self.execute = horizon, execute
        self.rate = PlanningRate()
        self._proposer = proposer
        self._seeds = [int(seed) for seed in seeds]
        self._episode_N = np.full(len(self._seeds), -1)
        self._generators = [torch.Generator() for _ in self._seeds]
        self._fresh_N = np.ones(len(self._seeds), dtype=np.bool_)
        self._state: StateT | None = None
        self._plan = first_plan(len(self._seeds), horizon, dynamics.action_mean_A)
        self._pending: list[NDArray[np.float32]] = []
        self._carried_out = 0
        self._asked = 0
        self._seen: tuple[Observation | None, Observation | None] = (None, None)

    def reset(self, mask_N: NDArray[np.bool_]) -> None:
        """Forget the plans where ``mask_N`` is true; the next observation begins these episodes."""
        for n in np.flatnonzero(mask_N):
            self._episode_N[n] += 1
            key = np.random.SeedSequence([self._seeds[n], int(self._episode_N[n])])
            self._generators[n].manual_seed(int(key.generate_state(1)[0]))
        self._fresh_N = self._fresh_N | mask_N

    def observe(self, observation: Observation) -> None:
        """Keep the model's context in step with one more real observation.

        Raises:
            EnvironmentState: more was observed than actions were given.
        """
        self._seen = (None if self._fresh_N.any() else self._seen[1], observation)
        if self._state is None:
            self._state = self.dynamics.start(observation)
        else:
            if not self._pending and not self._fresh_N.all():
                raise EnvironmentState("an observation came without an action before it; call act() first, or reset().")
            nothing = np.zeros((len(self._seeds), len(self.dynamics.action_mean_A)), np.float32)
            action = self._pending.pop(0) if self._pending else nothing
            self._state = self.dynamics.observe(self._state, action, observation, self._fresh_N)
            self._carried_out += 1
        if self._fresh_N.any():
            fresh = torch.from_numpy(self._fresh_N)
            self._plan = self._plan.where(fresh.to(self.dynamics.action_mean_A.device), self.dynamics.action_mean_A)
            self._fresh_N = np.zeros_like(self._fresh_N)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Plan from here; the next actions (N, execute, A)."""
        begun = time.perf_counter()
        self.observe(observation)
        state = self._state
        assert state is not None
        self._plan = self.search(state, observation)
        actions = self._plan.actions_NHA[:, : self.execute].cpu().numpy().astype(np.float32)
        self._pending = [np.array(actions[:, h]) for h in range(self.execute)]
        self._carried_out = 0
        self.rate.seconds += time.perf_counter() - begun
        return actions

    def search(self, state: StateT, observation: Observation) -> Plan:
        """The best plan from a state of N rows that shows this observation; the state is not changed."""
        dynamics, rows = self.dynamics, len(self._seeds)
        low = dynamics.action_low_A
        proposals = low.new_zeros(rows, 0, self.horizon, len(low))
        if self._proposer is not None:
            proposals = self._proposer.propose(state, self._seen[0], observation, self._asked)
        self._asked += 1
        tried = 0

        def value(plans_NKHA: Tensor) -> Tensor:
            nonlocal tried
            tried += plans_NKHA.shape[0] * plans_NKHA.shape[1]
            return plan_values(dynamics, state, self.objective, plans_NKHA)

        problem = Problem(value, low, dynamics.action_high_A, dynamics.action_std_A, proposals)
        plan = self.planner.plan(problem, self._plan.shifted(self._carried_out), self._generators)
        self.rate.plans += rows
        self.rate.candidates += tried
        return plan
