"""Where the robot goes, and the object with it, as far as motion and actions tell: no picture is looked at.

- :class:`RobotCoast` knows the robot alone;
- :class:`ManipulationCoast` also knows one rigid object, and that it stays where it is, goes with the hand, or falls,
  but for what a network adds. When it does which, slips and pushes are what is left to learn; and these are the same
  wherever on the table and whichever way around they happen, so the network is told of them as the hand feels them.

Everything is computed in float32: a position in half precision tells no velocity.

Shape legend: K steps of history, P agent_pos dims, X = 9 dims of an object's pose (position 3 m, the first two columns
of its rotation matrix), A action dims x stride.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.domains import Domain
from hma_gym.dynamics.pose import Pose
from hma_gym.nn.parameters import silence
from hma_gym.nn.rotations import columns_of_matrix, matrix_of_columns, matrix_of_quaternion
from hma_gym.nn.waves import waves

#: Dims of an object's pose: its position comes first.
OBJECT_DIM, PLACE = 9, slice(0, 3)

#: The hand's rotation in agent_pos, a quaternion xyzw.
ROTATION = slice(3, 7)

#: Scales (m) on which the hand sees the object: grasps are decided by millimetres.
REACH, NEAR = 0.3, 0.04

#: One step's usual change of a moving object's position (m) and of the numbers of its rotation.
OBJECT_STEP = (0.004,) * 3 + (0.04,) * 6

#: Holds agent_pos (..., P) where it may be.
Bounds = Callable[[Tensor], Tensor]

#: Octaves of the finest waves that tell where the object lies in the hand.
OCTAVES = 3

#: Standard gravity, m/s^2.
GRAVITY = 9.81

#: By how much an untrained network prefers that the object stays, in units of the softmax over what it may do.
STAYS = 6.0


class ExactLinear(nn.Linear):
    """A linear layer that stays in float32 where others are put into a lower precision."""


def _network(inputs: int, width: int, layers: int, outputs: int) -> nn.Sequential:
    """A multilayer perceptron that begins as zero."""
    widths = [inputs] + [width] * layers
    hidden: list[nn.Module] = []
    for into, out in zip(widths[:-1], widths[1:], strict=True):
        hidden += [ExactLinear(into, out), nn.SiLU()]
    last = ExactLinear(width, outputs)
    silence(last)
    return nn.Sequential(*hidden, last)


class RobotCoast(nn.Module):
    """The next agent_pos from the last K changes and actions: a linear path, for most of it is linear, and a network.

    Untrained, the robot stands still.

    Args:
        domain: the embodiment.
        history: K.
        octaves: of the waves that show agent_pos.
        width, layers: of the network.
        extra_inputs: of the network, for a subclass.
    """

    def __init__(
        self,
        domain: Domain,
        history: int,
        octaves: int,
        width: int,
        layers: int,
        extra_inputs: int = 0,
    ) -> None:
        super().__init__()
        self.octaves, self.state_dim = octaves, domain.state_dim
        for name in ("state_mean", "state_std", "delta_std"):
            self.register_buffer(name, torch.tensor(getattr(domain, name), dtype=torch.float32), persistent=False)
        P, A = domain.state_dim, domain.action_dim * domain.stride
        past = history * (P + 1) + (history + 1) * (A + 1)
        self.inertia = ExactLinear(past, P)
        self.network = _network(P * (1 + 2 * octaves) + past + extra_inputs, width, layers, P)
        silence(self.inertia)

    def standard(self, agent_pos: Tensor) -> Tensor:
        """agent_pos (..., P) in own units to zero mean and unit variance."""
        return (agent_pos - self.get_buffer("state_mean")) / self.get_buffer("state_std")

    def _past(self, pose: Pose, action: Tensor, given: Tensor) -> Tensor:
        motions = torch.where(pose.known[..., None], self._motions(pose) / self.get_buffer("delta_std"), 0.0)
        acted = torch.cat((given[..., None], pose.acted), dim=-1)
        actions = torch.cat((action[..., None, :], pose.actions), dim=-2)
        seen = (motions.flatten(-2), pose.known.float())
        done = (torch.where(acted[..., None], actions, 0.0).flatten(-2), acted.float())
        return torch.cat((*seen, *done), dim=-1)

    def _motions(self, pose: Pose) -> Tensor:
        """The last changes of agent_pos (..., K, P), own units."""
        return pose.motions

    def _settled(self, agent_pos: Tensor, within: Bounds) -> Tensor:
        """agent_pos (..., P) as foretold -> as it can be."""
        return within(agent_pos)

    def _moved(self, pose: Pose, action: Tensor, given: Tensor, within: Bounds, extra: Sequence[Tensor]) -> Tensor:
        """The next agent_pos (..., P)."""
        past = self._past(pose, action, given)
        said: Tensor = self.network(
            torch.cat((waves(self.standard(pose.agent_pos), self.octaves), past, *extra), dim=-1)
        )
        change = said + self.inertia(past)
        return self._settled(pose.agent_pos + change * self.get_buffer("delta_std"), within)

    def forward(self, pose: Pose, action: Tensor, given: Tensor, within: Bounds) -> tuple[Tensor, Tensor]:
        """The next agent_pos (..., P) and targets (..., X), own units; X = 0 here.

        Args:
            pose: up to now.
            action: (..., A), normalised; ``given`` (...) bool hides it where False.
            within: holds agent_pos where it may be; what the hand holds goes no further than the hand.
        """
        return self._moved(pose, action, given, within, ()), pose.targets


class ManipulationCoast(RobotCoast):
    """Robot and object. With the hand's next pose known, the object stays where it is, keeps its pose in the hand, or
    goes on as it moved and falls, down to where objects lie: a softmax says how much of each, and a network adds
    something to what moves. An object that stays does so exactly, for any number of steps.

    That network sees and says everything in the hand's frame: position and rotation of the object, how both moved and
    how the hand goes on, where down is, how high both are above where objects lie, the fingers, the action. So what
    happens in one place it knows of all (but for the action, whose frame is the controller's). The robot's own network
    is told of the object too, for it stops fingers.
    """

    def __init__(self, domain: Domain, history: int, octaves: int, width: int, layers: int) -> None:
        fingers, actions = domain.state_dim - 7, domain.action_dim * domain.stride
        seen = 3 + (3 + 2) * (1 + 2 * OCTAVES) + 6 + fingers + 6 * history
        super().__init__(domain, history, octaves, width, layers, seen)
        felt = seen + history + 3 + 3 + 6 + fingers * (1 + history) + actions + 1
        self.handling = _network(felt, width, layers, OBJECT_DIM + 3)
        last = self.handling[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias[-3] = STAYS
        self.drop = GRAVITY * (domain.stride / domain.control_hz) ** 2
        self.register_buffer("floor", torch.tensor(-math.inf))
        self.register_buffer("object_step", torch.tensor(OBJECT_STEP), persistent=False)
        self.register_buffer("height", torch.tensor(domain.target_mean[2]), persistent=False)
        self.register_buffer("height_std", torch.tensor(max(domain.target_std[2], 1e-3)), persistent=False)

    def _motions(self, pose: Pose) -> Tensor:
        """A quaternion that was replaced by its negative is the same rotation: that change is no motion."""
        turned = pose.motions[..., ROTATION]
        still = torch.where(turned.norm(dim=-1, keepdim=True) > 1.0, 0.0, turned)
        return torch.cat((pose.motions[..., PLACE], still, pose.motions[..., 7:]), dim=-1)

    def _settled(self, agent_pos: Tensor, within: Bounds) -> Tensor:
        """With a unit quaternion, of the two that are the same rotation the one that lies in bounds."""
        unit = F.normalize(agent_pos[..., ROTATION], dim=-1)
        both = torch.stack(
            [torch.cat((agent_pos[..., PLACE], turn, agent_pos[..., 7:]), dim=-1) for turn in (unit, -unit)]
        )
        held = within(both)
        out, other_out = (held - both).norm(dim=-1, keepdim=True)
        return torch.where(other_out < out, held[1], held[0])

    def set_floor(self, height: float) -> None:
        """Below which no object falls: the height (m) of the position of one that lies, in the training data."""
        self.get_buffer("floor").fill_(height)

    def _seen(self, pose: Pose, hand: Tensor, turned: Tensor, place: Tensor) -> list[Tensor]:
        """The object, in the hand's frame."""
        step = self.get_buffer("object_step")[PLACE]
        moved = _into(hand, pose.target_motions[..., PLACE] / step)
        against = _into(hand, (pose.target_motions[..., PLACE] - pose.motions[..., PLACE]) / step)
        known = pose.known[..., None]
        heights = torch.stack((pose.targets[..., 2], pose.agent_pos[..., 2]), dim=-1) - self.get_buffer("height")
        heights = heights / self.get_buffer("height_std")
        return [
            (place / REACH).clamp(-3.0, 3.0),
            waves((place / NEAR).clamp(-4.0, 4.0), OCTAVES),
            turned,
            waves(heights.clamp(-4.0, 4.0), OCTAVES),
            self.standard(pose.agent_pos)[..., 7:],
            torch.where(known, moved, 0.0).clamp(-5.0, 5.0).flatten(-2),
            torch.where(known, against, 0.0).clamp(-5.0, 5.0).flatten(-2),
        ]

    def _felt(
        self, pose: Pose, hand: Tensor, next_pos: Tensor, next_hand: Tensor, action: Tensor, given: Tensor
    ) -> list[Tensor]:
        """What the hand does, in its own frame."""
        step = self.get_buffer("object_step")
        gone = _into(hand, ((next_pos - pose.agent_pos)[..., PLACE] / step[PLACE]).unsqueeze(-2)).squeeze(-2)
        still = columns_of_matrix(torch.eye(3, dtype=hand.dtype, device=hand.device))
        turned = (columns_of_matrix(hand.mT @ next_hand) - still) / step[PLACE.stop :]
        fingers = torch.where(pose.known[..., None], pose.motions[..., 7:], 0.0)
        fingers = torch.cat(((next_pos - pose.agent_pos)[..., None, 7:], fingers), dim=-2)
        return [
            pose.known.float(),
            hand[..., 2, :],  # the room's upright axis
            gone.clamp(-10.0, 10.0),
            turned.clamp(-10.0, 10.0),
            (fingers / self.get_buffer("delta_std")[7:]).clamp(-10.0, 10.0).flatten(-2),
            torch.where(given[..., None], action, 0.0),
            given[..., None].float(),
        ]

    def _fall(self, pose: Pose) -> Tensor:
        """By how much the object's pose changes in free fall, (..., 9); it turns no further."""
        motion = torch.where(pose.known[..., :1], pose.target_motions[..., 0, PLACE], 0.0)
        height = pose.targets[..., 2]
        down = torch.maximum(motion[..., 2] - self.drop, (self.get_buffer("floor") - height).clamp(max=0.0))
        return torch.cat((motion[..., :2], down[..., None], torch.zeros_like(pose.targets[..., 3:])), dim=-1)

    def forward(self, pose: Pose, action: Tensor, given: Tensor, within: Bounds) -> tuple[Tensor, Tensor]:
        """See :class:`RobotCoast`; X = 9."""
        hand, place, thing = in_the_hand(pose.agent_pos, pose.targets)
        seen = self._seen(pose, hand, columns_of_matrix(thing), place)
        agent_pos = self._moved(pose, action, given, within, seen)
        next_hand = matrix_of_quaternion(agent_pos[..., ROTATION])
        felt = self._felt(pose, hand, agent_pos, next_hand, action, given)
        said: Tensor = self.handling(torch.cat((*seen, *felt), dim=-1))
        stays, held, falls = said[..., OBJECT_DIM:].softmax(dim=-1).split(1, dim=-1)
        added = (said[..., :OBJECT_DIM] * self.get_buffer("object_step")).unflatten(-1, (3, 3))
        added = (added @ hand.mT).flatten(-2)  # three vectors, out of the hand's frame
        carried = torch.cat(
            (
                agent_pos[..., PLACE] + (next_hand @ place[..., None])[..., 0],
                columns_of_matrix(next_hand @ thing),
            ),
            dim=-1,
        )
        targets = pose.targets + held * (carried - pose.targets) + falls * self._fall(pose) + (1 - stays) * added
        turned = columns_of_matrix(matrix_of_columns(targets[..., 3:]))
        return agent_pos, torch.cat((targets[..., PLACE], turned), dim=-1)


def in_the_hand(agent_pos: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """agent_pos (..., P) and the object's pose (..., 9) -> the hand's rotation (..., 3, 3) in the room; the object's
    position (..., 3) and rotation (..., 3, 3) in the hand."""
    hand = matrix_of_quaternion(agent_pos[..., ROTATION])
    place = (hand.mT @ (targets[..., PLACE] - agent_pos[..., PLACE])[..., None])[..., 0]
    return hand, place, hand.mT @ matrix_of_columns(targets[..., 3:])


def _into(hand: Tensor, vectors: Tensor) -> Tensor:
    """(..., K, 3) of the room -> of the frame ``hand`` (..., 3, 3)."""
    return vectors @ hand
