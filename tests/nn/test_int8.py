"""Products of 8-bit integers, against the same arithmetic in numpy, and what of a network they replace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.errors import InvalidArgument
from hma_gym.nn.activations import gelu_between
from hma_gym.nn.int8 import WIDER, InputRange, Int8Conv2d, Int8Linear, in_int8, input_ranges
from hma_gym.nn.packed import PackedLinear, packed

pytestmark = pytest.mark.int8

LOW, HIGH = -2.0, 3.0


def rounded_input(x: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """What 8 bits keep of numbers between ``WIDER`` times these."""
    scale = WIDER * (high - low) / 255
    zero = round(-WIDER * low / scale)
    integers = np.clip(np.rint(x.double().numpy() / scale) + zero, 0, 255)
    return torch.from_numpy((integers - zero) * scale)


def rounded_weight(weight: Tensor) -> Tensor:
    """What 8 bits keep of each output's weights."""
    scale = weight.abs().flatten(1).amax(dim=1).double().view(-1, *(1,) * (weight.ndim - 1)) / 127
    return (weight.double() / scale).round() * scale


def clear_of_halves(integers: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers near integers, so that no float's last bit decides to which of two they are rounded."""
    return integers + 0.8 * torch.rand(integers.shape, generator=generator) - 0.4


def inputs(*shape: int, generator: torch.Generator) -> Tensor:
    """Some of them are beyond the range, and cut."""
    steps = torch.randint(-160, 220, shape, generator=generator)
    return clear_of_halves(steps, generator) * (WIDER * (HIGH - LOW) / 255)


def set_weights(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    steps = clear_of_halves(torch.randint(-126, 127, layer.weight.shape, generator=generator), generator)
    steps.flatten(1)[:, 0] = 127.0
    layer.weight.data = 0.001 * steps


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("rows", [1, 17, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_multiplies_what_8_bits_keep(rows: int, bias: bool, generator: torch.Generator) -> None:
    layer = nn.Linear(96, 40, bias=bias)
    set_weights(layer, generator)
    x = inputs(2, rows, 96, generator=generator)
    with torch.inference_mode():
        said = Int8Linear(layer, InputRange(LOW, HIGH, rows))(x)
    expected = F.linear(
        rounded_input(x), rounded_weight(layer.weight), None if layer.bias is None else layer.bias.double()
    )
    assert said.dtype == torch.float32 and said.shape == (2, rows, 40)
    assert torch.allclose(said.double(), expected, atol=2e-4)
    assert not torch.allclose(said, layer(x), atol=2e-3)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (4, 2, 1), (1, 1, 0), (4, 4, 0)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_multiplies_what_8_bits_keep(
    kernel: int, stride: int, padding: int, layout: torch.memory_format, generator: torch.Generator
) -> None:
    layer = nn.Conv2d(24, 20, kernel, stride, padding)
    set_weights(layer, generator)
    x = inputs(3, 24, 16, 12, generator=generator).to(memory_format=layout)
    with torch.inference_mode():
        said = Int8Conv2d(layer, InputRange(LOW, HIGH, 1))(x)
    assert layer.bias is not None
    weights = rounded_weight(layer.weight), layer.bias.double()
    expected = F.conv2d(rounded_input(x), *weights, stride=stride, padding=padding)  # a padded 0 is 0 exactly
    assert said.dtype == torch.float32 and torch.allclose(said.double(), expected, atol=2e-4)


def test_a_row_does_not_depend_on_those_beside_it(generator: torch.Generator) -> None:
    layer = Int8Linear(nn.Linear(256, 64), InputRange(LOW, HIGH, 1))
    x = torch.randn(40, 256, generator=generator)
    other = torch.cat((x[:1], 100 * x[1:]))
    with torch.inference_mode():
        assert torch.equal(layer(x)[0], layer(other)[0])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_gelu_between_two_layers_stays_in_integers(approximate: str, generator: torch.Generator) -> None:
    up, down = nn.Linear(64, 128), nn.Linear(128, 64)
    x = torch.randn(50, 64, generator=generator)
    middle = F.gelu(up(x), approximate=approximate).detach()
    seen = InputRange(float(middle.min()), float(middle.max()), 50)
    first, second = Int8Linear(up, InputRange(-4.0, 4.0, 50)), Int8Linear(down, seen)
    with torch.inference_mode():
        kept = first.gelu(x, approximate, second)
        assert kept.dtype == torch.uint8
        exact = rounded_input(F.gelu(first(x), approximate=approximate), seen.low, seen.high)
        assert (
            float(((kept.double() - second.integers.zero) * second.integers.scale - exact).abs().max())
            < 1.01 * second.integers.scale
        )
        assert torch.allclose(gelu_between(first, x, second, approximate), down(middle), atol=0.05)
        alone = gelu_between(first, x, down, approximate)  # a float32 layer reads float32
        assert torch.allclose(alone, down(F.gelu(first(x), approximate=approximate)), atol=1e-3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.frame, self.never = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.dark, self.grouped = nn.Linear(32, 32), nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = self.tokens(x_BND) + self.dark(torch.zeros_like(x_BND))
        y_BCHW = self.grouped(x_BND.view(len(x_BND), 8, 8, -1))
        y_BD: Tensor = self.frame(x_BND.mean(dim=1)) + y_BCHW.mean(dim=(1, 2, 3))[:, None]
        return y_BD


def test_what_does_much_work_is_replaced_in_a_copy(generator: torch.Generator) -> None:
    net, x = Net(), torch.randn(4, 16, 32, generator=generator)
    with torch.inference_mode(), input_ranges(net) as ranges:
        net(x)
        net(-2 * x)
    assert set(ranges) == {"tokens", "frame", "dark"}
    assert ranges["tokens"] == InputRange(float((-2 * x).min()), float((-2 * x).max()), 64)
    assert ranges["frame"].rows == 4 and ranges["dark"] == InputRange(0.0, 0.0, 64)
    before = ranges["tokens"]
    net(100 * x)
    assert ranges["tokens"] == before  # nothing is seen any more
    fast = in_int8(net, ranges, rows=4)
    kinds = {name: type(layer) for name, layer in fast.named_children()}
    assert kinds == {
        "tokens": Int8Linear,
        "frame": nn.Linear,
        "never": nn.Linear,
        "dark": nn.Linear,
        "grouped": nn.Conv2d,
    }
    assert type(net.tokens) is nn.Linear and fast.tokens.weight.data_ptr() != net.tokens.weight.data_ptr()
    again = packed(copy.deepcopy(fast), rows=64)
    assert type(again.tokens) is Int8Linear and type(again.frame) is PackedLinear
    with torch.inference_mode():
        expected = net(x)
        assert 0 < float((fast(x) - expected).abs().max()) < 0.05
        assert torch.allclose(again(x), fast(x), atol=1e-5)


def test_weights_elsewhere_or_of_another_precision_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="bfloat16 on cpu"):
        in_int8(nn.Linear(4, 4).bfloat16(), {})
    with pytest.raises(InvalidArgument, match="float32 on meta"):
        in_int8(nn.Linear(4, 4, device="meta"), {})
