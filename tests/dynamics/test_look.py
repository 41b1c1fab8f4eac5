"""Drawing frames from poses: every token is told where it lies beside the things."""

from __future__ import annotations

import torch

from hma_gym.dynamics.look import Look
from hma_gym.nn.parameters import default_parameter_groups
from hma_gym.training import Optimizer, OptimizerConfig

GRID = (6, 6)


def _blob(place_B2: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 36, 1) that show a small bright spot at a place in [-1, 1] x [-1, 1]; columns run along x."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, GRID[0]), torch.linspace(-1, 1, GRID[1]), indexing="ij")
    grid = torch.stack((x, y), dim=-1).flatten(0, 1)
    return torch.exp(-((grid - place_B2[:, None]) / 0.3).square().sum(dim=-1))[..., None]


def _look(thing: int = 3) -> Look:
    torch.manual_seed(0)
    return Look(GRID, 1, features=5 + thing, robot=2, thing=thing, width=32, layers=2, condition=16)


def _inputs(rows: int, seed: int, span: float = 0.9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, the robot's numbers and the object's place, whose first two are where the spot is."""
    generator = torch.Generator().manual_seed(seed)
    robot = torch.randn(rows, 2, generator=generator)
    thing = span * (2 * torch.rand(rows, 3, generator=generator) - 1)
    return torch.cat((robot, robot.square(), robot[:, :1], thing), dim=-1), robot, thing


def test_untrained_it_draws_the_mean_and_any_leading_dims_are_alike() -> None:
    look = _look()
    features, robot, thing = _inputs(6, 0)
    assert torch.equal(look(features, robot, thing), torch.zeros(6, 36, 1))
    torch.nn.init.normal_(look.out.weight)
    flat = look(features, robot, thing)
    folded = look(*(x.unflatten(0, (2, 3)) for x in (features, robot, thing)))
    torch.testing.assert_close(folded.flatten(0, 1), flat)
    torch.testing.assert_close(look(features[2:3], robot[2:3], thing[2:3]), flat[2:3])


def test_without_an_object_there_are_no_anchors_of_it() -> None:
    look = _look(thing=0)
    features, robot, thing = _inputs(4, 0)
    assert look.object_anchors is None
    assert look(features[:, :5], robot, thing[:, :0]).shape == (4, 36, 1)


def test_it_learns_to_draw_a_thing_where_it_is_also_where_it_never_was() -> None:
    """Trained on spots in the middle two thirds, it draws them further out too, for all tokens share one network."""
    look = _look().train()
    optimizer = Optimizer(look, default_parameter_groups(look), OptimizerConfig(lr=4e-3, weight_decay=0.0))
    steps = 400
    for step in range(steps):
        features, robot, thing = _inputs(64, 100 + step, span=0.7)
        loss = (look(features, robot, thing) - _blob(thing[:, :2])).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0 - step / steps)
    look.eval().requires_grad_(False)
    for span, share in ((0.7, 0.1), (0.85, 0.25)):
        features, robot, thing = _inputs(256, 7, span)
        wanted = _blob(thing[:, :2])
        wrong = (look(features, robot, thing) - wanted).square().mean()
        assert wrong < share * wanted.var()
