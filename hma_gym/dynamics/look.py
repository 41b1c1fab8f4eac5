"""What robot and object look like: a frame's soft tokens, drawn from their poses alone.

What a token shows depends on where it lies beside the things, so each is told this: anchors, points of the picture,
move with the poses (some with the robot's, some with the object's), and every token sees how far it is from each. One
small network then serves all tokens; a thing that it can draw in one place it can draw in others.

Shape legend: leading dims (...), I inputs, S tokens of a frame, C channels, K anchors, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.nn.parameters import silence
from hma_gym.nn.waves import waves

#: Anchors that move with the robot, and with the object.
ROBOT_ANCHORS, OBJECT_ANCHORS = 6, 2

#: Octaves of the waves of the distances to anchors, of which 1 is half of the picture.
OCTAVES = 4


class Anchors(nn.Module):
    """Points of the picture, (..., K, 2) in [-1, 1], as a smooth function of standardised positions (..., I)."""

    def __init__(self, inputs: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.straight = nn.Linear(inputs, 2 * count)
        self.bent = nn.Sequential(nn.Linear(inputs, 32), nn.SiLU(), nn.Linear(32, 2 * count))
        last = self.bent[2]
        silence(last)
        nn.init.normal_(self.straight.weight, std=0.3 / inputs**0.5)

    def forward(self, standard: Tensor) -> Tensor:
        points: Tensor = self.straight(standard).float() + self.bent(standard).float()
        anchors: Tensor = points.unflatten(-1, (self.count, 2))
        return anchors


class ConditionedLayer(nn.Module):
    """x + MLP(norm(x)), whose hidden layer a condition shifts; begins as the identity."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.up, self.shift, self.down = nn.Linear(width, width), nn.Linear(condition, width), nn.Linear(width, width)
        silence(self.down)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.up(F.layer_norm(x, x.shape[-1:])) + self.shift(condition)[..., None, :]
        change: Tensor = self.down(F.silu(hidden))
        return x + change


class Look(nn.Module):
    """Poses to standardised tokens, (..., S, C). Untrained, it gives zeros: the mean of all frames.

    Args:
        grid: (rows, columns) of the tokens; S is their product.
        channels: C.
        features: numbers that describe the poses.
        robot, thing: numbers of agent_pos, and of the object's position (0 without one), that move the anchors.
        width, layers: of the network of a token.
        condition: width of what all tokens are told.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        channels: int,
        features: int,
        robot: int,
        thing: int,
        width: int,
        layers: int,
        condition: int = 256,
    ) -> None:
        super().__init__()
        rows, columns = grid
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        self.register_buffer("places", torch.stack((x, y), dim=-1).flatten(0, 1), persistent=False)
        self.robot_anchors = Anchors(robot, ROBOT_ANCHORS)
        self.object_anchors = Anchors(thing, OBJECT_ANCHORS) if thing else None
        count = ROBOT_ANCHORS + (OBJECT_ANCHORS if thing else 0)
        self.condition = nn.Sequential(
            nn.Linear(features, condition), nn.SiLU(), nn.Linear(condition, condition), nn.SiLU()
        )
        self.near = nn.Linear(2 * count * (1 + 2 * OCTAVES), width)
        self.token = nn.Parameter(0.1 * torch.randn(rows * columns, width))
        self.first = nn.Linear(condition, width)
        self.layers = nn.ModuleList(ConditionedLayer(width, condition) for _ in range(layers))
        self.out = nn.Linear(width, channels)
        silence(self.out)

    def forward(self, features: Tensor, robot: Tensor, thing: Tensor) -> Tensor:
        anchors = self.robot_anchors(robot)
        if self.object_anchors is not None:
            anchors = torch.cat((anchors, self.object_anchors(thing)), dim=-2)
        away = self.get_buffer("places")[:, None, :] - anchors[..., None, :, :]
        condition = self.condition(features)
        x = self.near(waves(away.flatten(-2), OCTAVES)) + self.token + self.first(condition)[..., None, :]
        for layer in self.layers:
            x = layer(x, condition)
        drawn: Tensor = self.out(F.layer_norm(x, x.shape[-1:]))
        return drawn
