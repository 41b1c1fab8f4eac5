"""The soft head: it learns distributions, not only means, and its mean is the closed form where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hma_gym.dynamics.heads import Draw, Scene
from hma_gym.dynamics.mar import FlowHeadConfig, SoftHead
from hma_gym.errors import InvalidArgument

WIDTH = 8


def _head(**fields: object) -> SoftHead:
    torch.manual_seed(0)
    settings = {"grid": (2, 2), "channels": 2, "patch": 1, "flow_width": 32, "flow_layers": 2, "flow_steps": 16}
    return SoftHead(FlowHeadConfig(**{**settings, **fields}), WIDTH)  # type: ignore[arg-type]


def _draw(rows: int, step: int = 0) -> Draw:
    return Draw(torch.arange(rows), torch.full((rows,), step), 0)


def _fit(head: SoftHead, draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], steps: int = 400) -> None:
    """Train on features (B, 1, 4, D) and the changes (B, 1, 4, 2) that follow them, drawn anew at every step."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    head.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        features, change = draw(generator)
        previous = torch.randn(change.shape, generator=generator)
        masked = torch.ones(features.shape[:3], dtype=torch.bool)
        loss, _ = head.loss(features, previous + change, Scene(previous, None), masked, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    head.eval().requires_grad_(False)


def test_two_modes_stay_two_modes() -> None:
    """The change is -0.8 or 0.8 in both channels of a token: its mean, 0, never happens."""
    head = _head(change_scale=0.8)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        sign = torch.randint(2, (128, 1, 4, 1), generator=generator) * 2.0 - 1
        return torch.zeros(128, 1, 4, WIDTH), 0.8 * sign + 0.02 * torch.randn(128, 1, 4, 2, generator=generator)

    _fit(head, draw)
    rows = 200
    start = torch.zeros(rows, 4, 2)
    sampled, _ = head.sample(torch.zeros(rows, 4, WIDTH), Scene(start, None), _draw(rows), 1.0)
    near = (sampled.abs() - 0.8).abs() < 0.25
    assert near.float().mean() > 0.9
    assert ((sampled[..., 0] > 0) == (sampled[..., 1] > 0)).float().mean() > 0.95  # the channels agree
    assert abs(float((sampled > 0).float().mean()) - 0.5) < 0.1
    mean, _ = head.sample(torch.zeros(rows, 4, WIDTH), Scene(start, None), _draw(rows), 0.0)
    assert mean.abs().max() < 0.15


def test_linear_gaussian_closed_form() -> None:
    """change = A feature + noise: the mean is least squares, the spread around it the noise."""
    head = _head(change_scale=1.0)
    noise, matrix = 0.2, 0.2 * torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(0))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        features = torch.randn(128, 1, 4, WIDTH, generator=generator)
        return features, features @ matrix + noise * torch.randn(128, 1, 4, 2, generator=generator)

    _fit(head, draw)
    rows = 300
    features = torch.randn(rows, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted, previous = features @ matrix, torch.ones(rows, 4, 2)
    mean, _ = head.sample(features, Scene(previous, None), _draw(rows), 0.0)
    assert float((mean - previous - wanted).abs().max()) < 0.05
    for temperature in (0.5, 1.0):  # straight paths from a Gaussian to a Gaussian keep their scale
        sampled, _ = head.sample(features, Scene(previous, None), _draw(rows), temperature)
        spread = sampled - previous - wanted
        assert abs(float(spread.mean())) < 0.03
        assert float(spread.std()) == pytest.approx(temperature * noise, rel=0.15)


def test_only_masked_tokens_count() -> None:
    head = _head(flow_weight=0.5)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head.eval()
    generator = torch.Generator().manual_seed(0)
    features, tokens = torch.randn(3, 2, 4, WIDTH), torch.randn(3, 2, 4, 2)
    previous = torch.randn(3, 2, 4, 2)
    masked = torch.rand(3, 2, 4, generator=generator) < 0.5
    other = torch.where(masked[..., None], tokens, tokens + 5.0)
    a, b, c = (
        float(head.loss(features, t, Scene(previous, None), masked, torch.Generator().manual_seed(1))[0].detach())
        for t in (tokens, other, tokens + 5.0)
    )
    assert a == pytest.approx(b, rel=1e-6) and a != pytest.approx(c, rel=1e-3)


def test_the_mean_learns_nothing_from_the_flow() -> None:
    """The flow models what the mean leaves over; the mean is regression alone."""
    head = _head()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    gradients = []
    for weight in (0.0, 10.0):
        head.config = FlowHeadConfig((2, 2), 2, 1, flow_weight=weight)
        head.zero_grad()
        loss, _ = head.loss(
            torch.ones(1, 1, 4, WIDTH),
            torch.ones(1, 1, 4, 2),
            Scene(torch.zeros(1, 1, 4, 2), None),
            torch.ones(1, 1, 4, dtype=torch.bool),
            torch.Generator().manual_seed(0),
        )
        loss.backward()  # type: ignore[no-untyped-call]
        assert head.mean_out.weight.grad is not None
        gradients.append(head.mean_out.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_patches_put_every_token_back_in_its_place() -> None:
    head = _head(grid=(4, 4), patch=2)
    tokens = torch.arange(16.0)[:, None] + torch.tensor([0.0, 0.5])
    assert torch.equal(head._unpatch(head._patch(tokens)), tokens)
    assert head._patch(tokens)[0].tolist() == [0.0, 0.5, 1.0, 1.5, 4.0, 4.5, 5.0, 5.5]
    masked = torch.zeros(1, 4, dtype=torch.bool)
    masked[0, 3] = True
    merged = head.merge(tokens[None], tokens[None] + 100, masked)
    assert [i for i in range(16) if merged[0, i, 0] >= 100] == [10, 11, 14, 15]


def test_corruption_has_one_level_a_row_within_its_bound() -> None:
    head = _head(grid=(8, 8), noise_max=0.3)
    tokens = torch.zeros(200, 4, 64, 2)
    level = head.corrupt(tokens, torch.Generator().manual_seed(0)).flatten(1).std(dim=1)
    assert float(level.max()) < 0.33 and abs(float(level.mean()) - 0.15) < 0.02 and float(level.std()) > 0.05


def test_samples_depend_on_seed_and_step_only() -> None:
    head = _head()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head.requires_grad_(False)
    features, previous = torch.ones(3, 4, WIDTH), torch.zeros(3, 4, 2)
    same = Draw(torch.tensor([7, 8, 7]), torch.tensor([2, 2, 2]), 0)
    sampled, _ = head.sample(features, Scene(previous, None), same, 1.0)
    assert torch.equal(sampled[0], sampled[2]) and not torch.equal(sampled[0], sampled[1])
    later, _ = head.sample(features, Scene(previous, None), Draw(same.seed_B, same.step_B + 1, 0), 1.0)
    assert not torch.equal(later[0], sampled[0])


def test_wrong_geometry_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="patch must divide the grid"):
        FlowHeadConfig((8, 7), patch=2)
