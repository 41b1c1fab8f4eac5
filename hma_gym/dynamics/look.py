"""What robot and object look like: a frame's soft tokens, drawn from their poses alone.

What a token shows depends on where it lies beside the things, so each is told this: anchors, points of the picture,
move with the poses, and every token sees how far it is from each. One small network then serves all tokens; a thing
that it can draw in one place it can draw in others.

- Some anchors are free: a network says where they are (some move with the robot, some with the object).
- Where the domain's camera is known, others are points that are fixed to the hand, and the object's own place, as that
  camera sees them: these need not be learned.

An object changes a picture only where it is. So tokens know of it the less the further they are from it, and beyond its
``reach``, which is learned, nothing: far from the object, whatever the hand does looks as it does without one.

Shape legend: leading dims (...), R numbers that describe the robot, O those of the object, S tokens of a frame (T of
them drawn), C channels, K anchors, P agent_pos dims, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.nn.parameters import ParameterGroup, silence
from hma_gym.nn.precision import full_precision
from hma_gym.nn.rotations import matrix_of_quaternion
from hma_gym.nn.waves import waves

#: Free anchors that move with the robot, and with the object; and points that are fixed to the hand.
ROBOT_ANCHORS, OBJECT_ANCHORS, HAND_ANCHORS = 16, 2, 8

#: Where points are fixed to the hand at first (m, in its frame): scattered so far about a point between the fingers.
SCATTER, MIDDLE = (0.04, 0.06, 0.08), (0.0, 0.0, -0.04)

#: Octaves of the waves of the distances to anchors, of which 1 is half of the picture.
OCTAVES = 4

#: The object's reach at first, in halves of the picture; and where the anchor that it is measured from is learned too.
REACH, BLIND_REACH = 0.5, 1.2

#: What is left of an object's influence that counts as nothing.
FAINT = 0.02

#: Points so far out of the picture (in halves of it) are nowhere.
OUTSIDE = 3.0

#: How much faster than the rest anchors are learned, and the object's reach.
ANCHORS_RATE, REACH_RATE = 1.5, 5.0


@dataclass(frozen=True)
class Things:
    """What is to be drawn; leading dims (...) are equal.

    Attributes:
        robot: (..., R) and ``thing`` (..., O), features of their poses; O = 0 without an object.
        standard_pos: agent_pos, standardised, (..., P); ``standard_place`` the object's position likewise, (..., 3).
        agent_pos: own units, (..., P); ``place`` the object's position, (..., 3).
    """

    robot: Tensor
    thing: Tensor
    standard_pos: Tensor
    standard_place: Tensor
    agent_pos: Tensor
    place: Tensor


class Anchors(nn.Module):
    """Points of the picture, (..., K, 2) in [-1, 1], as a smooth function of standardised positions (..., I)."""

    def __init__(self, inputs: int, count: int, hidden: int) -> None:
        super().__init__()
        self.count = count
        self.straight = nn.Linear(inputs, 2 * count)
        self.bent = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, 2 * count))
        last = self.bent[2]
        silence(last)
        nn.init.normal_(self.straight.weight, std=0.3 / inputs**0.5)

    def forward(self, standard: Tensor) -> Tensor:
        points: Tensor = self.straight(standard).float() + self.bent(standard).float()
        anchors: Tensor = points.unflatten(-1, (self.count, 2))
        return anchors


class Camera(nn.Module):
    """Points of the room (..., 3), m, to points of the picture (..., 2), of which the outer tokens' centres lie at -1
    and 1.

    Args:
        projection: see :class:`hma_gym.domains.Domain`.
        grid: (rows, columns) of the tokens.
    """

    def __init__(self, projection: tuple[float, ...], grid: tuple[int, int]) -> None:
        super().__init__()
        rows, columns = grid
        matrix_34 = torch.tensor(projection, dtype=torch.float32).view(3, 4)
        stretch_31 = torch.tensor([[columns / max(columns - 1, 1)], [rows / max(rows - 1, 1)], [1.0]])
        self.register_buffer("matrix_34", matrix_34 * stretch_31, persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        matrix_34 = self.get_buffer("matrix_34")
        with full_precision(points.device):
            seen = points.float() @ matrix_34[:, :3].T + matrix_34[:, 3]
            return (seen[..., :2] / seen[..., 2:].clamp(min=1e-3)).clamp(-OUTSIDE, OUTSIDE)


class ConditionedLayer(nn.Module):
    """x + MLP(norm(x)), whose hidden layer conditions shift: one of the robot, and one of the object where that
    reaches. Begins as the identity."""

    def __init__(self, width: int, condition: int, thing: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.shift = nn.Linear(condition, width)
        self.thing_shift = nn.Linear(condition, width) if thing else None
        silence(self.down)

    def forward(self, x: Tensor, condition: Tensor, thing: Tensor | None, nearness: Tensor) -> Tensor:
        """Gives up ``x`` where a CPU wants no gradients: there its memory, and that of what comes between, is used
        again."""
        hidden, shift = self.up(F.layer_norm(x, x.shape[-1:])), self.shift(condition)[..., None, :]
        thing_shift = None if self.thing_shift is None else self.thing_shift(thing)[..., None, :]
        if x.is_cuda or torch.is_grad_enabled():
            hidden = hidden + shift
            if thing_shift is not None:
                hidden = hidden + nearness * thing_shift
            changed: Tensor = x + self.down(F.silu(hidden))
            return changed
        hidden.add_(shift)
        if thing_shift is not None:
            hidden.addcmul_(nearness, thing_shift)
        deeper: Tensor = x.add_(self.down(F.silu(hidden, inplace=True)))
        return deeper


class Look(nn.Module):
    """Poses to standardised tokens. Untrained, it gives zeros: the mean of all frames.

    Args:
        grid: (rows, columns) of the tokens; S is their product.
        channels: C.
        robot: R; ``thing``: O, 0 without an object.
        state_dim: P.
        width, layers: of the network of a token.
        condition: width of what all tokens are told.
        projection: the camera's, see :class:`hma_gym.domains.Domain`; empty where it is not known. With one, agent_pos
            begins with a hand's pose.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        channels: int,
        robot: int,
        thing: int,
        state_dim: int,
        width: int,
        layers: int,
        condition: int = 256,
        projection: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        rows, columns = grid
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        self.register_buffer("places", torch.stack((x, y), dim=-1).flatten(0, 1), persistent=False)
        self.grid = grid
        self.camera = Camera(projection, grid) if projection else None
        self.robot_anchors = Anchors(state_dim, ROBOT_ANCHORS, 96)
        count = ROBOT_ANCHORS
        if self.camera is not None:
            self.on_hand = nn.Parameter(torch.randn(HAND_ANCHORS, 3) * torch.tensor(SCATTER) + torch.tensor(MIDDLE))
            count += HAND_ANCHORS
        self.condition = _condition(robot, condition)
        self.near = nn.Linear(2 * count * (1 + 2 * OCTAVES), width)
        self.token = nn.Parameter(0.1 * torch.randn(rows * columns, width))
        self.first = nn.Linear(condition, width)
        self.object_anchors: Anchors | None = None
        if thing:
            self.object_anchors = Anchors(3, OBJECT_ANCHORS, 32)
            self.thing_condition = _condition(robot + thing, condition)
            count = OBJECT_ANCHORS + (self.camera is not None)
            self.thing_near = nn.Linear(2 * count * (1 + 2 * OCTAVES), width)
            self.thing_first = nn.Linear(condition, width)
            self.reach = nn.Parameter(torch.tensor(REACH if self.camera is not None else BLIND_REACH))
        self.layers = nn.ModuleList(ConditionedLayer(width, condition, bool(thing)) for _ in range(layers))
        self.out = nn.Linear(width, channels)
        silence(self.out)

    def geometry(self) -> dict[str, nn.Parameter]:
        """What it has learned of where things are, by name: of the same shapes in any width."""
        own = ("on_hand", "robot_anchors", "object_anchors", "reach")
        return {name: p for name, p in self.named_parameters() if name.partition(".")[0] in own}

    def parameter_groups(self) -> list[ParameterGroup]:
        """For training by itself."""
        geometry = self.geometry()
        reach = [geometry.pop("reach")] if "reach" in geometry else []
        chosen = {id(p) for p in (*geometry.values(), *reach)}
        return [
            ParameterGroup("look", [p for p in self.parameters() if id(p) not in chosen]),
            ParameterGroup("anchors", list(geometry.values()), lr_multiplier=ANCHORS_RATE),
            ParameterGroup("reach", reach, lr_multiplier=REACH_RATE),
        ]

    def anchors_of_robot(self, things: Things) -> Tensor:
        """(..., K, 2)."""
        points: Tensor = self.robot_anchors(things.standard_pos)
        if self.camera is None:
            return points
        hand = matrix_of_quaternion(things.agent_pos[..., 3:7])
        fixed = things.agent_pos[..., None, :3] + (hand[..., None, :, :] @ self.on_hand[..., None])[..., 0]
        return torch.cat((self.camera(fixed), points), dim=-2)

    def anchors_of_object(self, things: Things) -> Tensor:
        """(..., K, 2); the object's influence is measured from the first."""
        assert self.object_anchors is not None
        points: Tensor = self.object_anchors(things.standard_place)
        if self.camera is None:
            return points
        return torch.cat((self.camera(things.place[..., None, :]), points), dim=-2)

    def nearness(self, things: Things, tokens: Tensor | slice = slice(None)) -> Tensor:
        """How much each token knows of the object, (..., T, 1) from 0 to 1."""
        return self._nearness(self.anchors_of_object(things), tokens)

    def _nearness(self, anchors: Tensor, tokens: Tensor | slice) -> Tensor:
        away = self.get_buffer("places")[tokens] - anchors[..., :1, :]
        share = torch.exp(-away.square().sum(dim=-1, keepdim=True) / self.reach.square())
        return ((share - FAINT) / (1.0 - FAINT)).clamp(min=0.0)

    def beside(self, layer: nn.Linear, anchors: Tensor, told: Tensor) -> Tensor:
        """What a layer makes of where all tokens lie beside anchors (..., K, 2), as waves, and what all are told,
        (..., D): (..., S, D).

        The numbers of x are alike in all tokens of a column, those of y in all of a row, so each is worked out once.
        """
        weight_DWK2 = layer.weight.unflatten(1, (1 + 2 * OCTAVES, -1, 2))
        places = self.get_buffer("places").unflatten(0, self.grid)
        parts = []
        for axis, line in enumerate((places[0, :, 0], places[:, 0, 1])):
            away = waves(line[:, None] - anchors[..., None, :, axis], OCTAVES)
            parts.append(F.linear(away.to(layer.weight.dtype), weight_DWK2[..., axis].flatten(1)).to(anchors.dtype))
        x, y = parts
        y = y + (layer.bias.to(anchors.dtype) + told)[..., None, :]
        return (x[..., None, :, :] + y[..., :, None, :]).flatten(-3, -2)

    def forward(self, things: Things, tokens: Tensor | slice = slice(None)) -> Tensor:
        """(..., T, C) of some tokens, indices (T,), or of all."""
        condition = self.condition(things.robot)
        x = self.beside(self.near, self.anchors_of_robot(things), self.first(condition))[..., tokens, :]
        x = x + self.token[tokens]
        thing, nearness = None, x.new_zeros(())
        if self.object_anchors is not None:
            thing = self.thing_condition(torch.cat((things.robot, things.thing), dim=-1))
            anchors = self.anchors_of_object(things)
            nearness = self._nearness(anchors, tokens)
            told = self.beside(self.thing_near, anchors, self.thing_first(thing))[..., tokens, :]
            x = torch.addcmul(x, nearness, told)
        for layer in self.layers:
            x = layer(x, condition, thing, nearness)
        drawn: Tensor = self.out(F.layer_norm(x, x.shape[-1:]))
        return drawn


def _condition(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
