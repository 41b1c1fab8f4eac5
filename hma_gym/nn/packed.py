"""Linear layers whose weights lie as the processor's matrix kernels want them: faster products on CPUs, by choice.

A library of matrix products rearranges a weight matrix at every call. oneDNN can be given it rearranged once. For many
rows that is worth a tenth of a product, for few (one environment) a third. And where PyTorch's own library (MKL) does
not use the widest instructions that a processor has, as on an AMD EPYC with AVX-512, oneDNN does: twice as fast there.
Results differ by float rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hma_gym.errors import InvalidArgument
from hma_gym.nn.activations import FusedGelu
from hma_gym.nn.held import OPERATORS, Held, held
from hma_gym.nn.replacing import ModuleT, with_layers


class _PackedWeights(Held):
    """A layer's weights as oneDNN wants them, and its bias."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def product(self, x: Tensor, after: str, algorithm: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, after, [], algorithm)
        return y


class PackedLinear(nn.Linear, FusedGelu):
    """A linear layer with a second, rearranged copy of its weights.

    Its product is in the dtype of the weights, its output in that of its input.

    Args:
        layer: whose weights are shared; they must not change any more.
        rows: of an input, roughly.
    """

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self._packed = _PackedWeights(layer, rows)
        self.register_buffer("_number", torch.tensor(self._packed.number), persistent=False)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, "none").to(x.dtype)

    def gelu(self, x: Tensor, approximate: str, into: nn.Module) -> Tensor:
        return self._product(x, "gelu", approximate)

    def _product(self, x: Tensor, after: str, algorithm: str = "") -> Tensor:
        x = x.to(self.weight.dtype)
        if torch.compiler.is_compiling():
            y: Tensor = torch.ops.hma_gym.linear_packed(
                x, self.get_buffer("_number"), self.out_features, after, algorithm
            )
            return y
        return self._packed.product(x, after, algorithm)


def _linear_by_number(x: Tensor, number: Tensor, outputs: int, after: str, algorithm: str) -> Tensor:
    y: Tensor = held(number).product(x, after, algorithm)
    return y


def _linear_as_planned(x: Tensor, number: Tensor, outputs: int, after: str, algorithm: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


OPERATORS.define("linear_packed(Tensor x, Tensor number, int outputs, str after, str algorithm) -> Tensor")
OPERATORS.impl("linear_packed", _linear_by_number, "CPU")
torch.library.register_fake("hma_gym::linear_packed", _linear_as_planned, lib=OPERATORS)


def packed(module: ModuleT, rows: int) -> ModuleT:
    """A copy of a module, with weights of its own, whose linear layers are packed. For inference on a CPU.

    Args:
        rows: how many rows the layers' inputs have, roughly; they may have others.

    Raises:
        InvalidArgument: weights on another device, or a PyTorch without oneDNN.
    """
    devices = sorted({parameter.device.type for parameter in module.parameters()})
    onednn = torch.backends.mkldnn.is_available()
    if devices != ["cpu"] or not onednn:
        raise InvalidArgument(
            "packed weights need weights on the CPU and a PyTorch with oneDNN, got weights on "
            f"{devices} and {'oneDNN' if onednn else 'no oneDNN'}; leave them as they are."
        )

    def pack(name: str, layer: nn.Module) -> nn.Module | None:
        if isinstance(layer, nn.Linear) and not isinstance(layer, FusedGelu):
            return PackedLinear(layer, rows)
        return None

    return with_layers(module, pack)
