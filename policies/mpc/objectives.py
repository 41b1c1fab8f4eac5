"""What a plan is worth: objectives over imagined futures.

Any function of :class:`~hma_gym.policies.mpc.protocol.Futures` is one; here are the common ones. Only
:class:`JudgedSuccess` has frames decoded.

Shape legend: B plans, H steps, S C tokens, W the judge's window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hma_gym.errors import InvalidArgument
from hma_gym.judges.protocol import Judge, TokenJudge
from hma_gym.policies.mpc.protocol import Futures, Objective


@dataclass(frozen=True)
class JudgedSuccess:
    """The judge's probability of success at the end of a plan; decodes as many frames of each plan as it sees."""

    judge: Judge

    def __call__(self, futures: Futures) -> Tensor:
        """(B,) in [0, 1]."""
        return self.judge.probability(futures.frames(self.judge.window))


@dataclass(frozen=True)
class JudgedByTokens:
    """The same of a judge that reads tokens: nothing is decoded."""

    judge: TokenJudge

    def __call__(self, futures: Futures) -> Tensor:
        """(B,) in [0, 1]."""
        return self.judge.probability_of_tokens(futures.window(self.judge.window))


@dataclass(frozen=True)
class GoalImage:
    """How near a plan comes to a goal image, in token space.

    Attributes:
        goal: tokens of the goal image, (S, C): ``tokenizer.encode(image[None])[0]``. Soft tokens only.
        at_end: share of the last step in the value; the rest is the mean over all steps.
    """

    goal: Tensor
    at_end: float = 0.5

    def __post_init__(self) -> None:
        if not self.goal.is_floating_point() or not 0 <= self.at_end <= 1:
            raise InvalidArgument(
                f"a goal image needs soft tokens and at_end in [0, 1], got {self.goal.dtype} and {self.at_end}."
            )

    def __call__(self, futures: Futures) -> Tensor:
        """(B,): minus the root mean square distance of the tokens."""
        distance_BH = (futures.tokens - self.goal).square().flatten(2).mean(dim=-1).sqrt()
        return -(self.at_end * distance_BH[:, -1] + (1 - self.at_end) * distance_BH.mean(dim=1))


@dataclass(frozen=True)
class ReachAndLift:
    """For Lift: hand to cube, close around it, up; read off predicted poses, nothing decoded.

    The cube's place is the model's own prediction (its privileged head), as ``agent_pos`` is: so it can be planned on
    in a world that shows pixels only. Stages as in robosuite's shaped reward: nearness, a grasp, height.

    Attributes:
        rest_height: of the cube's centre on the table (m).
        lift_height: how far above that counts as lifted (m).
        at_end: share of the last step in the value; the rest is the mean over all steps.
        upright: weight of the hand's tilt (squared sine of half the angle from pointing down): a model that saw upright
            hands has strange ideas of others.
        calm: weight of the mean squared change from one action to the next. The data's hands do not twitch, and what
            the model makes of twitches is not to be trusted, least of all in a gripper that holds something.
    """

    rest_height: float = 0.822
    lift_height: float = 0.05
    at_end: float = 0.5
    upright: float = 5.0
    calm: float = 0.05

    def __call__(self, futures: Futures) -> Tensor:
        """(B,).

        Raises:
            InvalidArgument: the model predicts no position of an object, or no hand with two fingers.
        """
        if futures.targets_BHX.shape[2] < 3 or futures.agent_pos_BHP.shape[2] < 9:
            raise InvalidArgument(
                "reach and lift needs predicted targets (object position 3) and agent_pos (position 3, quaternion 4, "
                f"fingers 2), got {futures.targets_BHX.shape[2]} and {futures.agent_pos_BHP.shape[2]} numbers; plan on "
                "the judge's probability."
            )
        hand, cube = futures.agent_pos_BHP[..., :3], futures.targets_BHX[..., :3]
        opening_BH = (futures.agent_pos_BHP[..., 7] - futures.agent_pos_BHP[..., 8]) / 0.08  # 1 open, 0 closed
        aside_BH = (hand - cube)[..., :2].norm(dim=-1)
        above_BH = (hand - cube)[..., 2].abs()
        near_BH = 1 - torch.tanh(8 * (1.5 * aside_BH + above_BH))
        around_BH = torch.exp(-(aside_BH / 0.02).square() - (above_BH / 0.02).square())
        # Closing pays around the cube only; elsewhere an open hand does.
        grip_BH = around_BH * (1 - opening_BH) + (1 - around_BH) * 0.5 * opening_BH
        height_BH = ((cube[..., 2] - self.rest_height) / self.lift_height).clamp(0, 1)
        tilt_BH = futures.agent_pos_BHP[..., 5:7].square().sum(dim=-1)  # z and w of a hand that points down are 0
        value_BH = near_BH + 0.4 * grip_BH + 3.0 * height_BH - self.upright * tilt_BH
        twitch_BH = futures.actions_BHA.diff(dim=1).square().mean(dim=2)
        twitch_B = twitch_BH.mean(dim=1) if twitch_BH.shape[1] else torch.zeros_like(value_BH[:, 0])
        return self.at_end * value_BH[:, -1] + (1 - self.at_end) * value_BH.mean(dim=1) - self.calm * twitch_B


@dataclass(frozen=True)
class Cautious:
    """An objective minus a penalty for steps that the model is unsure of.

    Attributes:
        objective: any.
        weight: of the mean uncertainty over the plan's steps, at least 0.
    """

    objective: Objective
    weight: float

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InvalidArgument(f"weight of the uncertainty must be at least 0, got {self.weight}.")

    def __call__(self, futures: Futures) -> Tensor:
        """(B,)."""
        return self.objective(futures) - self.weight * futures.uncertainty_BH.mean(dim=1)
