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
from hma_gym.judges.protocol import Judge, TokenJudge, ask
from hma_gym.nn.rotations import matrix_of_quaternion
from hma_gym.policies.mpc.protocol import Futures, Objective


@dataclass(frozen=True)
class JudgedSuccess:
    """The judge's probability of success at the end of a plan; decodes as many frames of each plan as it sees."""

    judge: Judge

    def __call__(self, futures: Futures) -> Tensor:
        """(B,) in [0, 1]."""
        last = self.judge.window
        return ask(self.judge, self.judge.probability, futures.frames(last), futures.agent_pos(last))


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
    """For Lift: the hand above the cube, down around it, closed, up; read off predicted poses, nothing decoded.

    The cube's place is the model's own prediction, as ``agent_pos`` is: so it can be planned on in a world that shows
    pixels only. Stages as in robosuite's shaped reward: nearness, a grasp, height. A search finds what a model is wrong
    about, so they keep to what it knows best: the hand comes from above, closes where the cube is well between the
    fingers and nowhere else, and height counts in the hand only.

    Attributes:
        rest_height: of the cube's centre on the table (m).
        lift_height: how far above that counts as lifted (m).
        hover: how high above its grasp a hand stays that is not above the cube yet (m).
        grasp: the hand's height above the cube's centre in a good grasp (m).
        tight: how far from there a grasp is worth 1/e of a good one (m).
        at_end: share of the last step in the value; the rest is the mean over all steps.
        upright: weight of the hand's tilt (squared sine of half the angle from pointing down): a model that saw upright
            hands has strange ideas of others.
        square: weight of how far the fingers are turned from the cube's sides, where the model knows its rotation.
        calm: weight of the mean squared change from one action to the next. The data's hands do not twitch, and what
            the model makes of twitches is not to be trusted, least of all in a gripper that holds something.
        effort: weight of the mean squared action without the gripper's: a hand that is where it should be rests.
    """

    rest_height: float = 0.82
    lift_height: float = 0.05
    hover: float = 0.05
    grasp: float = -0.004
    tight: float = 0.012
    at_end: float = 0.5
    upright: float = 5.0
    square: float = 0.3
    calm: float = 0.05
    effort: float = 0.02

    def __call__(self, futures: Futures) -> Tensor:
        """(B,).

        Raises:
            InvalidArgument: the model predicts no position of an object, or no hand with two fingers.
        """
        pose_BHP, targets_BHX = futures.agent_pos_BHP, futures.targets_BHX
        if targets_BHX.shape[2] < 3 or pose_BHP.shape[2] < 9:
            raise InvalidArgument(
                "reach and lift needs predicted targets (object position 3) and agent_pos (position 3, quaternion 4, "
                f"fingers 2), got {targets_BHX.shape[2]} and {pose_BHP.shape[2]} numbers; plan on the judge's "
                "probability."
            )
        offset_BH3, height_BH = pose_BHP[..., :3] - targets_BHX[..., :3], targets_BHX[..., 2] - self.rest_height
        closed_BH = 1 - (pose_BHP[..., 7] - pose_BHP[..., 8]) / 0.08
        aside_BH, above_BH = offset_BH3[..., :2].norm(dim=-1), offset_BH3[..., 2] - self.grasp
        # Beside the cube a hand stays above it, for one that comes from the side pushes: too low is the worse.
        above_path_BH = above_BH - self.hover * ((aside_BH - 0.01) / 0.03).clamp(0, 1)
        off_BH = 1.5 * aside_BH + torch.maximum(above_path_BH, -3 * above_path_BH)
        around_BH = torch.exp(-(aside_BH.square() + above_BH.square()) / self.tight**2)
        value_BH = 1.5 * (1 - torch.tanh(8 * off_BH))
        # Closed fingers pay around the cube, and cost elsewhere; around it, so does what tells them to go on closing.
        value_BH = value_BH + (2 * around_BH - 1) * closed_BH + 0.5 * around_BH * futures.actions_BHA[..., -1]
        lifts_BH = height_BH / self.lift_height  # once it is up it need not go higher
        value_BH = value_BH + around_BH * (3 * lifts_BH.clamp(0, 1) - 0.3 * (lifts_BH - 1.5).clamp(min=0))
        value_BH = value_BH - self.upright * pose_BHP[..., 5:7].square().sum(dim=-1)  # z and w are 0 pointing down
        if targets_BHX.shape[2] == 9:
            value_BH = value_BH - self.square * _askew(pose_BHP[..., 3:7], targets_BHX[..., 3:6])
        value_B = self.at_end * value_BH[:, -1] + (1 - self.at_end) * value_BH.mean(dim=1)
        if futures.actions_BHA.shape[1] > 1:
            value_B = value_B - self.calm * futures.actions_BHA.diff(dim=1).square().mean(dim=(1, 2))
        return value_B - self.effort * futures.actions_BHA[..., :-1].square().sum(dim=-1).mean(dim=1)


def _askew(quaternion: Tensor, side: Tensor) -> Tensor:
    """How far a hand (quaternion, ..., 4) is turned about the upright axis from the sides of a cube, one of which
    points along ``side`` (..., 3): 0 where square, 1 at 45 degrees, (...)."""
    finger = matrix_of_quaternion(quaternion)[..., 0]
    yaw = torch.atan2(finger[..., 1], finger[..., 0]) - torch.atan2(side[..., 1], side[..., 0])
    return 0.5 - 0.5 * (4 * yaw).cos()


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
