"""A fused product is the product with what comes before and after it, whatever the tiles.

Without a GPU kernels run in Triton's interpreter; see tests/nn/test_kernels_apart.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hma_gym.nn import fused
from hma_gym.nn.precision import tensor_float32
from hma_gym.nn.tiles import ProductTiles

pytestmark = pytest.mark.triton

DEVICES = [pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]

#: Rows, columns and depth: all of the depth at once, in parts, and more rows than there are.
TILES = [(16, 32, 128), (32, 64, 32), (256, 16, 32)]


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product has these tiles."""
    monkeypatch.setattr(fused, "product_tiles", lambda *_: ProductTiles(*request.param, warps=4, stages=2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("residual", ["none", "input", "older"])
@pytest.mark.usefixtures("tiles")
def test_fused_product(device: str, normalised: bool, residual: str) -> None:
    generator = torch.Generator().manual_seed(0)
    B, T, N, D = 2, 3, 21, 72
    E = D if residual == "input" else 104
    layer = nn.Linear(D, E, bias=normalised).requires_grad_(False)
    x = 1 + torch.randn(B, T, N, D, generator=generator)
    old = {"none": None, "input": x, "older": torch.randn(B, T, N, E, generator=generator)}[residual]

    inner = F.layer_norm(x, (D,), eps=1e-5) if normalised else x
    wanted = F.gelu(layer(inner)) if old is None else layer(inner) + old

    launcher, affine = fused.Launcher(torch.device(device)), fused.Affine.of(layer.to(device))
    rows = launcher.rows(x.to(device), torch.float32)
    epsilon = 1e-5 if normalised else None
    with tensor_float32(False):
        if old is None:
            made = launcher.linear(affine, rows, epsilon, gelu=True)
        else:
            onto = rows if residual == "input" else launcher.rows(old.to(device), torch.float32)
            made = launcher.linear_onto(affine, rows, onto, epsilon).x_BTND
    torch.testing.assert_close(made.cpu(), wanted, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("then", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.usefixtures("tiles")
def test_a_fused_sum_of_a_modulated_product_and_another(device: str, then: bool, apart: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    B, T, N, D = 2, 3, 21, 72
    first, second = (nn.Linear(D, D, bias=i == 0).requires_grad_(False).to(device) for i in range(2))
    x, y = (1 + torch.randn(2, B, T, N, D, generator=generator)).to(device)
    modulation = torch.randn(B, T if apart else 1, 2, 2, D, generator=generator).to(device)  # two layers, or parts
    shift, scale = modulation[:, :, 1, :, None].unbind(2)
    inner = first(F.layer_norm(x, (D,), eps=1e-5) * (1 + scale) + shift)

    launcher = fused.Launcher(torch.device(device))
    layers = fused.Modulated(*(torch.stack((torch.ones_like(w), w)) for w in (first.weight, first.bias)))
    told = launcher.modulate(layers, modulation).expand(-1, T, -1, -1, -1)[:, :, 1, 0]
    with tensor_float32(False):
        rows = launcher.rows(x, torch.float32)
        if then:
            own = layers.own(told, 0, D)
            made, wanted = launcher.linear_onto(own, rows, rows, 1e-5, (y, second.weight)).x_BTND, x + second(y)
        else:  # the last outputs alone
            own, weight = layers.own(told, 24, D), second.weight[24:]
            made, wanted = launcher.linear(own, rows, 1e-5, (rows, weight)), second(x)[..., 24:]
            inner = inner[..., 24:]
    torch.testing.assert_close(made, wanted + inner, rtol=0.0, atol=3e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_a_norm_of_parts_is_the_norm(device: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "product_tiles", lambda *_: ProductTiles(32, 32, 32, warps=4, stages=2))
    generator = torch.Generator().manual_seed(1)
    D = 72  # two parts of 32 columns, and one of 8
    first, second = (nn.Linear(D, D).requires_grad_(False).to(device) for _ in range(2))
    affines = fused.Affine.of(first), fused.Affine.of(second)
    x = torch.randn(1, 2, 19, D, generator=generator).to(device)
    old = (offset + torch.randn(1, 2, 19, D, generator=generator)).to(device)
    launcher = fused.Launcher(torch.device(device))
    with tensor_float32(False):
        rows = launcher.linear_onto(affines[0], x, launcher.rows(old, torch.float32))
        made = launcher.linear(affines[1], rows, 1e-5)
    wanted = second(F.layer_norm((first(x) + old).double(), (D,), eps=1e-5).float())
    assert rows.moments_BTN2P is not None and rows.moments_BTN2P.shape == (1, 2, 19, 2, 3)
    torch.testing.assert_close(made, wanted, rtol=0.0, atol=1e-5 if not offset else 3e-3)
