"""Drawing frames from poses: every token is told where it lies beside the things, and of the object only near it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from hma_gym.dynamics.look import FAINT, OCTAVES, Camera, Look, Things
from hma_gym.nn.parameters import default_parameter_groups
from hma_gym.nn.waves import waves
from hma_gym.training import Optimizer, OptimizerConfig

GRID = (6, 6)

#: A camera 1 m above the room's origin that looks straight down: x to the right, y up; 0.5 m there is half the picture.
ABOVE = (2.0, 0.0, 0.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0)


def _grid() -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, GRID[0]), torch.linspace(-1, 1, GRID[1]), indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)


def _blob(place_B2: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 36, 1) that show a small bright spot at a place in [-1, 1] x [-1, 1]; columns run along x."""
    return torch.exp(-((_grid() - place_B2[:, None]) / 0.3).square().sum(dim=-1))[..., None]


def _look(thing: int = 3, projection: tuple[float, ...] = ()) -> Look:
    torch.manual_seed(0)
    return Look(GRID, 1, 5, thing, 7, width=32, layers=2, condition=16, projection=projection)


def _things(rows: int, seed: int, span: float = 0.9, thing: int = 3) -> Things:
    """A hand anywhere, and an object whose first two numbers say where in the picture it is."""
    generator = torch.Generator().manual_seed(seed)
    pose = torch.cat((0.3 * torch.randn(rows, 3, generator=generator), torch.tensor([[1.0, 0, 0, 0]] * rows)), dim=-1)
    place = span * (2 * torch.rand(rows, 3, generator=generator) - 1)
    return Things(pose[:, :5], place[:, :thing], pose, place[:, :thing], pose, place[:, :thing])


def _folded(things: Things, shape: tuple[int, ...]) -> Things:
    return Things(**{f.name: getattr(things, f.name).unflatten(0, shape) for f in dataclasses.fields(Things)})


@pytest.mark.parametrize("projection", [(), ABOVE])
def test_untrained_it_draws_the_mean_and_any_leading_dims_and_tokens_are_alike(projection: tuple[float, ...]) -> None:
    look, things = _look(projection=projection), _things(6, 0)
    assert torch.equal(look(things), torch.zeros(6, 36, 1))
    for parameter in look.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    flat = look(things)
    torch.testing.assert_close(look(_folded(things, (2, 3))).flatten(0, 1), flat)
    one = Things(**{f.name: getattr(things, f.name)[2:3] for f in dataclasses.fields(Things)})
    torch.testing.assert_close(look(one), flat[2:3])
    chosen = torch.tensor([35, 0, 7])
    torch.testing.assert_close(look(things, chosen), flat[:, chosen])
    with torch.no_grad():  # without gradients memory is used again
        torch.testing.assert_close(look(things), flat)
        torch.testing.assert_close(look(things, chosen), flat[:, chosen])


def test_where_tokens_lie_is_worked_out_by_rows_and_columns() -> None:
    torch.manual_seed(0)
    look = Look((3, 5), 1, 5, 3, 7, width=8, layers=1, condition=16)
    anchors, layer = torch.randn(2, 3, 4, 2), torch.nn.Linear(2 * 4 * (1 + 2 * OCTAVES), 8)
    told = torch.randn(2, 3, 8)
    away = look.get_buffer("places")[:, None, :] - anchors[..., None, :, :]
    torch.testing.assert_close(
        look.beside(layer, anchors, told), layer(waves(away.flatten(-2), OCTAVES)) + told[:, :, None]
    )


def test_without_an_object_there_is_nothing_of_it() -> None:
    look = _look(thing=0)
    assert look.object_anchors is None and not any("thing" in name for name, _ in look.named_parameters())
    assert look(_things(4, 0, thing=0)).shape == (4, 36, 1)


def test_a_camera_sees_points_where_they_are_in_the_picture() -> None:
    camera = Camera(ABOVE, GRID)
    points = torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.0, 0.0], [0.0, 0.25, 0.5]])
    edges = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, -1.0]])  # nearer to the camera it is further out
    torch.testing.assert_close(camera(points), edges * 6 / 5)  # the outer of 6 tokens have their centres at 5/6
    behind = camera(torch.tensor([[0.1, 0.0, 2.0]]))
    assert behind.isfinite().all() and behind.abs().max() <= 3.0


def test_with_a_camera_anchors_are_fixed_to_hand_and_object() -> None:
    look, things = _look(projection=ABOVE), _things(8, 1, span=0.3)
    camera = look.camera
    assert camera is not None
    place = camera(things.place)
    torch.testing.assert_close(look.anchors_of_object(things)[:, 0], place)
    hands = look.anchors_of_robot(things)[:, : len(look.on_hand)]
    turned = things.agent_pos[:, None, :3] + look.on_hand * torch.tensor([1.0, -1.0, -1.0])  # half a turn about x
    torch.testing.assert_close(hands, camera(turned))
    nearness = look.nearness(things)[..., 0]
    away = (_grid() - place[:, None]).norm(dim=-1)
    assert ((nearness == 0) == (torch.exp(-(away**2) / look.reach**2) <= FAINT)).all()
    assert nearness.argmax(dim=1).equal(away.argmin(dim=1)) and nearness.max() <= 1


def test_far_from_the_object_nothing_is_known_of_it() -> None:
    look, things = _look(projection=ABOVE), _things(64, 2, span=0.4)
    for parameter in look.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(look.reach, 0.3)
    moved = dataclasses.replace(
        things, thing=things.thing.flip(0), standard_place=things.place.flip(0), place=things.place.flip(0)
    )
    far = (look.nearness(things) == 0) & (look.nearness(moved) == 0)
    same = (look(things) - look(moved)).abs() < 1e-6
    assert far.float().mean() > 0.2 and same[far].all() and not same[~far].all()


def test_it_learns_to_draw_a_thing_where_it_is_also_where_it_never_was() -> None:
    """Trained on spots in the middle two thirds, it draws them further out too, for all tokens share one network; and
    it finds out where they are, and that they do not reach far, without a camera."""
    look = _look().train()
    reach = look.reach.detach().clone()
    optimizer = Optimizer(look, default_parameter_groups(look), OptimizerConfig(lr=4e-3, weight_decay=0.0))
    steps = 400
    for step in range(steps):
        things = _things(64, 100 + step, span=0.7)
        loss = (look(things) - _blob(things.place[:, :2])).square().mean() + 0.002 * look.reach.log()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0 - step / steps)
    look.eval().requires_grad_(False)
    for span, share in ((0.7, 0.1), (0.85, 0.25)):
        things = _things(256, 7, span)
        wanted = _blob(things.place[:, :2])
        assert (look(things) - wanted).square().mean() < share * wanted.var()
    assert look.reach < reach
    anchor = look.anchors_of_object(_things(256, 7, 0.7))[:, 0]
    assert F.mse_loss(anchor, _things(256, 7, 0.7).place[:, :2]) < 0.3
