"""Linear layers whose weights lie as the processor's matrix kernels want them: faster products on CPUs, by choice.

A library of matrix products rearranges a weight matrix at every call. oneDNN can be given it rearranged once. For many
rows that is worth a tenth of a product, for few (one environment) a third; results differ by float rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hma_gym.errors import InvalidArgument
from hma_gym.nn.activations import FusedGelu
from hma_gym.nn.replacing import ModuleT, with_layers


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
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, "none").to(x.dtype)

    def gelu(self, x: Tensor, approximate: str, into: nn.Module) -> Tensor:
        return self._product(x, "gelu", approximate)

    def _product(self, x: Tensor, after: str, algorithm: str = "") -> Tensor:
        x, weight, bias = x.to(self.weight.dtype), self._packed, self.bias
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], algorithm)
        return y


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
