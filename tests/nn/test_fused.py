"""A fused product is the product with what comes before and after it, whatever the tiles.

Without a GPU kernels run in Triton's interpreter; see tests/nn/test_kernels_apart.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hma_gym.nn.precision import tensor_float32

pytestmark = pytest.mark.triton

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

#: Rows, columns and depth: all of the depth at once, in parts, and more rows than there are.
TILES = [(16, 32, 128), (32, 64, 32), (256, 16, 32)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("what", ["plain", "normalised", "modulated"])
@pytest.mark.parametrize("residual", ["none", "input", "older"])
def test_fused_product(
    device: str, tiles: tuple[int, int, int], what: str, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hma_gym.nn import fused

    monkeypatch.setattr(fused, "_product_tiles", lambda *_: fused._Tiles(*tiles, warps=4, stages=2))
    generator = torch.Generator().manual_seed(0)
    B, T, N, D = 2, 3, 21, 72
    E = D if residual == "input" else 104
    layer = nn.Linear(D, E, bias=what != "plain").requires_grad_(False)
    x = 1 + torch.randn(B, T, N, D, generator=generator)
    modulation = torch.randn(B, 1, 2 * D, generator=generator).expand(-1, T, -1)  # one for all frames
    old = {"none": None, "input": x, "older": torch.randn(B, T, N, E, generator=generator)}[residual]

    inner = x if what == "plain" else F.layer_norm(x, (D,), eps=1e-5)
    if what == "modulated":
        shift, scale = modulation[:, :, None].chunk(2, dim=-1)
        inner = inner * (1 + scale) + shift
    wanted = F.gelu(layer(inner)) if old is None else layer(inner) + old

    launcher, layer = fused.Launcher(torch.device(device)), layer.to(device)
    rows = launcher.rows(x.to(device), torch.float32)
    norm = fused._Norm(1e-5, modulation.to(device) if what == "modulated" else None) if what != "plain" else None
    with tensor_float32(False):
        if old is None:
            made = launcher.linear(layer, rows, norm, gelu=True)
        else:
            onto = rows if residual == "input" else launcher.rows(old.to(device), torch.float32)
            made = launcher.linear_onto(layer, rows, onto, norm).x_BTND
    torch.testing.assert_close(made.cpu(), wanted, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_a_norm_of_parts_is_the_norm(device: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from hma_gym.nn import fused

    monkeypatch.setattr(fused, "_product_tiles", lambda *_: fused._Tiles(32, 32, 32, warps=4, stages=2))
    generator = torch.Generator().manual_seed(1)
    D = 72  # two parts of 32 columns, and one of 8
    first, second = (nn.Linear(D, D).requires_grad_(False).to(device) for _ in range(2))
    x = torch.randn(1, 2, 19, D, generator=generator).to(device)
    old = (offset + torch.randn(1, 2, 19, D, generator=generator)).to(device)
    launcher = fused.Launcher(torch.device(device))
    with tensor_float32(False):
        rows = launcher.linear_onto(first, x, launcher.rows(old, torch.float32))
        made = launcher.linear(second, rows, fused._Norm(1e-5))
    wanted = second(F.layer_norm((first(x) + old).double(), (D,), eps=1e-5).float())
    assert rows.moments_BTNP2 is not None and rows.moments_BTNP2.shape == (1, 2, 19, 3, 2)
    torch.testing.assert_close(made, wanted, rtol=0.0, atol=1e-5 if not offset else 3e-3)
