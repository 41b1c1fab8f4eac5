"""Methods of a module through ``torch.compile``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn


def compile_methods(module: nn.Module, names: Sequence[str], *, fullgraph: bool) -> None:
    """Let these methods of a module run through ``torch.compile``, for each shape of their arguments anew.

    A copy of the module runs its own weights: the compiled code belongs to the class.

    Args:
        names: of methods of its class.
        fullgraph: whether to fail where the compiler must leave a part as it is.
    """
    for name in names:
        compiled = torch.compile(getattr(type(module), name), dynamic=False, fullgraph=fullgraph)
        setattr(module, name, functools.partial(compiled, module))
