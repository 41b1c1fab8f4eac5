"""Matrix products of 8-bit integers, for batches of rollouts on CPUs that have instructions for them, by choice.

Weights are rounded to integers of -127 to 127, one scale for each output; a layer's input to 0 to 255, of which the
scale and the zero point come from the smallest and the largest number that the layer was seen to read
(:func:`input_ranges`). Both are fixed: so a rollout's numbers do not depend on those beside it. Products are summed
exactly, what comes out is float32 again. Norms, softmax, the residual stream and the cache lose nothing; numbers beyond
the range are cut to it.

>>> with input_ranges(model) as ranges:  # doctest: +SKIP
...     model(x)
>>> fast = in_int8(model, ranges)  # doctest: +SKIP

Affine quantisation of inputs and symmetric one of weights as in Jacob et al. 2018 (arXiv 1712.05877, Section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hma_gym.errors import InvalidArgument
from hma_gym.nn.activations import FusedGelu
from hma_gym.nn.held import OPERATORS, Held, held
from hma_gym.nn.replacing import ModuleT, with_layers

#: Ranges are so much wider than what was seen.
WIDER = 1.1


@dataclass(frozen=True)
class InputRange:
    """What a layer was seen to read.

    Attributes:
        low, high: the smallest and the largest number, or 0.
        rows: the most vectors (of a linear layer) or pixels at once.
    """

    low: float = 0.0
    high: float = 0.0
    rows: int = 0

    def joined(self, low: float, high: float, rows: int) -> InputRange:
        """With another input."""
        return InputRange(min(self.low, low), max(self.high, high), max(self.rows, rows))


@contextmanager
def input_ranges(module: nn.Module) -> Iterator[dict[str, InputRange]]:
    """Sees what the linear and convolution layers of a module read inside, by their names; slower for as long."""
    ranges: dict[str, InputRange] = {}
    hooks = []
    for name, layer in module.named_modules():
        if _kind(layer) is not None:

            def see(layer: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                if not inputs[0].numel():
                    return
                low, high = (float(x) for x in inputs[0].aminmax())
                rows = inputs[0].numel() // inputs[0].shape[-1 if isinstance(layer, nn.Linear) else 1]
                ranges[name] = ranges.get(name, InputRange()).joined(low, high, rows)

            hooks.append(layer.register_forward_pre_hook(see))
    try:
        yield ranges
    finally:
        for hook in hooks:
            hook.remove()


class _Integers(Held):
    """A layer's weights (O, ...) as int8 with the scale of each output (O,), and the grid of what it reads: integers q
    that stand for ``scale`` (q - ``zero``).

    Args:
        pack: weights and scales to the weights as the processor's kernels want them.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, seen: InputRange, pack: Callable[[_Integers, Tensor], Tensor]
    ) -> None:
        super().__init__()
        low, high = WIDER * seen.low, WIDER * seen.high
        self.scale = (high - low) / 255.0
        self.zero = round(-low / self.scale)
        weight = layer.weight.detach()
        self.scale_O = weight.abs().flatten(1).amax(dim=1).clamp(min=1e-30) / 127.0
        self.zero_O = torch.zeros(len(weight), dtype=torch.int64)
        self.bias_O = None if layer.bias is None else layer.bias.detach()
        integers = (weight / self.scale_O.view(-1, *(1,) * (weight.ndim - 1))).round().to(torch.int8)
        self.packed = pack(self, integers.contiguous())


class _Reader(nn.Module):
    """A layer that reads integers."""

    integers: _Integers

    def _own(self, integers: _Integers) -> None:
        self.integers = integers
        # As tensors, so that code compiled for one layer serves others of its shape.
        self.register_buffer("_number", torch.tensor(integers.number), persistent=False)
        self.register_buffer("_inverse", torch.tensor(1.0 / integers.scale), persistent=False)
        self.register_buffer("_zero", torch.tensor(float(integers.zero)), persistent=False)

    def on_grid(self, x: Tensor) -> Tensor:
        """float32 as the integers that the layer reads, uint8."""
        if torch.compiler.is_compiling():
            steps = x * self.get_buffer("_inverse") + self.get_buffer("_zero")
            return steps.round().clamp(0.0, 255.0).to(torch.uint8)
        own = self.integers
        signed = torch.add(own.zero - 128.0, x, alpha=1.0 / own.scale).round_().clamp_(-128.0, 127.0)
        return signed.to(torch.int8).view(torch.uint8).bitwise_xor_(128)  # floats become int8 ten times faster


class Int8Linear(nn.Linear, _Reader, FusedGelu):
    """A linear layer whose product is of integers; it reads float32, or uint8 on its own grid, and gives float32.

    Args:
        layer: whose weights are shared, and rounded once; they must not change any more.
        seen: what it reads.
    """

    def __init__(self, layer: nn.Linear, seen: InputRange) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self._own(_Integers(layer, seen, lambda own, integers: torch.ops.onednn.qlinear_prepack(integers, None)))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, None, "none", "")

    def gelu(self, x: Tensor, approximate: str, into: nn.Module) -> Tensor:
        return self._product(x, into if isinstance(into, Int8Linear) else None, "gelu", approximate)

    def _product(self, x: Tensor, into: Int8Linear | None, after: str, algorithm: str) -> Tensor:
        rows = (x if x.dtype == torch.uint8 else self.on_grid(x)).reshape(-1, self.in_features)
        if torch.compiler.is_compiling():
            number, reader = self.get_buffer("_number"), None if into is None else into.get_buffer("_number")
            y = torch.ops.hma_gym.linear_int8(rows, number, reader, self.out_features, after, algorithm)
        else:
            y = _linear(rows, self.integers, None if into is None else into.integers, after, algorithm)
        return y.view(*x.shape[:-1], self.out_features)


class Int8Conv2d(nn.Conv2d, _Reader):
    """A convolution whose products are of integers; it reads and gives float32, with channels last in memory.

    Args:
        layer: of one group, without dilation. Its weights are shared, and rounded once; they must not change any more.
        seen: what it reads.
    """

    def __init__(self, layer: nn.Conv2d, seen: InputRange) -> None:
        assert not isinstance(layer.padding, str)
        size, stride, padding = (tuple(x) for x in (layer.kernel_size, layer.stride, layer.padding))
        bias = layer.bias is not None
        sizes: Any = {"kernel_size": size, "stride": stride, "padding": padding}
        super().__init__(layer.in_channels, layer.out_channels, **sizes, bias=bias, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

        def pack(own: _Integers, integers: Tensor) -> Tensor:
            fixed = (own.scale, own.zero, stride, padding, (1, 1), 1, None)
            packed: Tensor = torch.ops.onednn.qconv_prepack(integers, own.scale_O, *fixed)
            return packed

        self._own(_Integers(layer, seen, pack))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        pixels, stride, padding = self.on_grid(x), list(self.stride), list(map(int, self.padding))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        if torch.compiler.is_compiling():
            size = [self.out_channels, *self.kernel_size]
            number = self.get_buffer("_number")
            y: Tensor = torch.ops.hma_gym.convolution_int8(pixels, number, size, stride, padding)
            return y
        return _convolution(pixels, self.integers, stride, padding)


def _linear(rows: Tensor, own: _Integers, into: _Integers | None, after: str, algorithm: str) -> Tensor:
    """(R, I) uint8 to (R, O): float32, or uint8 on the grid of the layer that reads it."""
    scale, zero, dtype = (1.0, 0, torch.float32) if into is None else (into.scale, into.zero, torch.uint8)
    weights = own.packed, own.scale_O, own.zero_O, own.bias_O
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        rows, own.scale, own.zero, *weights, scale, zero, dtype, after, [], algorithm
    )
    return y


def _convolution(pixels: Tensor, own: _Integers, stride: list[int], padding: list[int]) -> Tensor:
    """(B, C, H, W) uint8 to (B, O, h, w) float32, both with channels last in memory."""
    weights = own.packed, own.scale_O, own.zero_O, own.bias_O
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(
        pixels, own.scale, own.zero, *weights, stride, padding, [1, 1], 1, 1.0, 0, torch.float32, "none", [], None
    )
    return y


OPERATORS.define(
    "linear_int8(Tensor rows, Tensor number, Tensor? into, int outputs, str after, str algorithm) -> Tensor"
)
OPERATORS.define("convolution_int8(Tensor pixels, Tensor number, int[] size, int[] stride, int[] padding) -> Tensor")


def _linear_by_number(
    rows: Tensor, number: Tensor, into: Tensor | None, outputs: int, after: str, algorithm: str
) -> Tensor:
    return _linear(rows, held(number), None if into is None else held(into), after, algorithm)


def _linear_as_planned(
    rows: Tensor, number: Tensor, into: Tensor | None, outputs: int, after: str, algorithm: str
) -> Tensor:
    return rows.new_empty(len(rows), outputs, dtype=torch.float32 if into is None else torch.uint8)


def _convolution_by_number(
    pixels: Tensor, number: Tensor, size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return _convolution(pixels, held(number), stride, padding)


def _convolution_as_planned(
    pixels: Tensor, number: Tensor, size: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    sides = zip(pixels.shape[2:], size[1:], stride, padding, strict=True)
    shape = (len(pixels), size[0], *((side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in sides))
    return torch.empty(shape, device=pixels.device, dtype=torch.float32, memory_format=torch.channels_last)


OPERATORS.impl("linear_int8", _linear_by_number, "CPU")
OPERATORS.impl("convolution_int8", _convolution_by_number, "CPU")
torch.library.register_fake("hma_gym::linear_int8", _linear_as_planned, lib=OPERATORS)
torch.library.register_fake("hma_gym::convolution_int8", _convolution_as_planned, lib=OPERATORS)


def _kind(layer: nn.Module) -> type[Int8Linear | Int8Conv2d] | None:
    """What a layer becomes in integers, if it can."""
    if type(layer) is nn.Linear:
        return Int8Linear
    if type(layer) is nn.Conv2d and not isinstance(layer.padding, str):
        plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
        return Int8Conv2d if plain else None
    return None


def lacks_int8() -> str:
    """Why there are no fast products of integers here; "" if there are."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "this CPU has no VNNI instructions"
    return ""


def check_int8(module: nn.Module) -> None:
    """Raises InvalidArgument for weights that are not float32 on a CPU, or a machine without such products."""
    kinds = sorted({f"{p.dtype} on {p.device.type}" for p in module.parameters()})
    reason = lacks_int8()
    if kinds != ["torch.float32 on cpu"] or reason:
        raise InvalidArgument(
            "products of integers need float32 weights on a CPU with VNNI and a PyTorch with oneDNN, got weights of "
            f"{kinds}{'; ' + reason if reason else ''}; choose another precision."
        )


def in_int8(module: ModuleT, ranges: Mapping[str, InputRange], rows: int = 0) -> ModuleT:
    """A copy of a float32 module, with weights of its own, whose products are of integers. For inference on a CPU.

    Args:
        module: on a CPU.
        ranges: what its layers read, by name; others stay as they are, and so do those that read nothing but zeros.
        rows: layers that were seen to read no more rows than this at once stay as they are.

    Raises:
        InvalidArgument: see :func:`check_int8`.
    """
    check_int8(module)

    def rounded(name: str, layer: Any) -> nn.Module | None:
        kind, seen = _kind(layer), ranges.get(name, InputRange())
        return kind(layer, seen) if kind is not None and seen.rows > rows and seen.high > seen.low else None

    return with_layers(module, rounded)
