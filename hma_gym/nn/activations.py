"""GELU, after a layer: by itself, or inside the layer's own product where that can do it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FusedGelu(ABC):
    """A layer whose product can end in a GELU."""

    @abstractmethod
    def gelu(self, x: Tensor, approximate: str, into: nn.Module) -> Tensor:
        """GELU of the layer's output, for a layer ``into`` to read: in its dtype of products, or in its integers.

        Args:
            approximate: ``none`` or ``tanh``, as in :func:`torch.nn.functional.gelu`.
        """


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU. Its tanh form goes by a sigmoid where a CPU wants no gradients: the same to rounding, in half the time."""
    if approximate != "tanh" or x.is_cuda or torch.is_grad_enabled():
        return F.gelu(x, approximate=approximate)
    rate = 2 * math.sqrt(2 / math.pi)  # gelu(x) = x sigmoid(rate (x + 0.044715 x^3))
    return x.square().mul_(0.044715 * rate).add_(rate).mul_(x).sigmoid_().mul_(x)


def gelu_between(layer: nn.Module, x: Tensor, into: nn.Module, approximate: str = "none") -> Tensor:
    """``into(gelu(layer(x)))``, with what is between them in the form that costs least."""
    if isinstance(layer, FusedGelu):
        hidden = layer.gelu(x, approximate, into)
    else:
        hidden = gelu(layer(x), approximate)
    y: Tensor = into(hidden)
    return y
