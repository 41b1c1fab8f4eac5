"""A copy of a network in which some layers are others, that do the same in another way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def with_layers(module: ModuleT, other: Callable[[str, nn.Module], nn.Module | None]) -> ModuleT:
    """A copy of a module, with weights of its own, for inference: no parameter of it wants gradients.

    Args:
        other: what stands in the place of a layer inside the module, of which it is given the name and the copy; None
            leaves it as it is.
    """
    twin = copy.deepcopy(module)
    for prefix, owner in list(twin.named_modules()):
        for own, layer in list(owner.named_children()):
            new = other(f"{prefix}.{own}" if prefix else own, layer)
            if new is not None:
                setattr(owner, own, new)
    return twin.requires_grad_(False)
