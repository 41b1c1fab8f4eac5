"""Model predictive control inside the learned world: CEM, iCEM and MPPI over a small dynamics protocol.

* :mod:`~hma_gym.policies.mpc.protocol`: what a model must do to be planned with, and what an objective sees;
* :mod:`~hma_gym.policies.mpc.planners`, :mod:`~hma_gym.policies.mpc.noise`: the searches;
* :mod:`~hma_gym.policies.mpc.objectives`: what a plan is worth;
* :mod:`~hma_gym.policies.mpc.proposals`: candidates from a policy;
* :mod:`~hma_gym.policies.mpc.body`, :mod:`~hma_gym.policies.mpc.learned`: a checkpoint's body, or its whole model, to
  plan with;
* :mod:`~hma_gym.policies.mpc.policy`: all of it as a policy, for either world;
* :mod:`~hma_gym.policies.mpc.loading`: what suits a checkpoint, and by name, for ``hma-gym evaluate``.
"""

from hma_gym.policies.mpc.body import BodyDynamics
from hma_gym.policies.mpc.learned import LearnedDynamics
from hma_gym.policies.mpc.objectives import Cautious, GoalImage, JudgedByTokens, JudgedSuccess, ReachAndLift
from hma_gym.policies.mpc.planners import CEM, ICEM, MPPI, Plan, Problem, first_plan
from hma_gym.policies.mpc.policy import MPCPolicy, imagine
from hma_gym.policies.mpc.proposals import PolicyProposals
from hma_gym.policies.mpc.protocol import Futures, Imagined, Objective, PlanningDynamics, Proposer

__all__ = [
    "CEM",
    "ICEM",
    "MPPI",
    "BodyDynamics",
    "Cautious",
    "Futures",
    "GoalImage",
    "Imagined",
    "JudgedByTokens",
    "JudgedSuccess",
    "LearnedDynamics",
    "MPCPolicy",
    "Objective",
    "Plan",
    "PlanningDynamics",
    "PolicyProposals",
    "Problem",
    "Proposer",
    "ReachAndLift",
    "first_plan",
    "imagine",
]
