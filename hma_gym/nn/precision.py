"""Matrix products in a lower precision than everything else, for rollouts and decoding.

Weights of linear and convolution layers are held in, and multiplied in, bfloat16; what comes out is float32 again, so
that norms, softmax, the residual stream and the cache lose nothing. (On a GPU the products of attention within a frame
are in bfloat16, too.) It is chosen by whoever loads a model, and never by itself: a rollout in bfloat16 is another
rollout than one in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.errors import InvalidArgument
from hma_gym.nn.replacing import ModuleT, with_layers

Precision = Literal["float32", "bfloat16"]

#: How products of float32 networks are rounded, too: ``tf32`` is float32 with inputs of products cut to 10 bits,
#: ``int8`` is :mod:`hma_gym.nn.int8`.
Products = Literal["float32", "tf32", "bfloat16", "int8"]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside, on devices that know it."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may run in TF32 inside (NVIDIA GPUs): those of matrices and of convolutions.

    PyTorch's own default allows it for convolutions alone. A CUDA graph keeps what held when it was recorded.
    """
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, convolutions.allow_tf32
    matrices.allow_tf32, convolutions.allow_tf32 = allowed, allowed
    try:
        yield
    finally:
        matrices.allow_tf32, convolutions.allow_tf32 = before


class LowLinear(nn.Linear):
    """A linear layer whose product is in the dtype of its weights and whose output is in that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class LowConv2d(nn.Conv2d):
    """A convolution whose products are in the dtype of its weights and whose output is in that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def _lower(layer: nn.Module) -> nn.Module | None:
    low: nn.Module
    if type(layer) is nn.Linear:
        low = LowLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif type(layer) is nn.Conv2d and isinstance(layer.padding, tuple):
        low = LowConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            bias=layer.bias is not None,
            device="meta",
        )
    else:
        return None
    weights = {name: weight.to(torch.bfloat16) for name, weight in layer.state_dict().items()}
    low.load_state_dict(weights, assign=True)
    return low.train(layer.training)


def in_precision(module: ModuleT, precision: Precision) -> ModuleT:
    """The module as it is (``float32``), or a copy of it that multiplies in bfloat16.

    Its parameters have the same names; the others share no memory with those of ``module``. For inference: gradients
    are not wanted of the copy.

    Raises:
        InvalidArgument: another precision.
    """
    if precision not in ("float32", "bfloat16"):
        raise InvalidArgument(f"precision must be 'float32' or 'bfloat16', got {precision!r}.")
    if precision == "float32":
        return module
    return with_layers(module, lambda name, layer: _lower(layer))
