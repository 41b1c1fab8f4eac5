"""Functions, and methods of a module, through ``torch.compile``."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

ResultT = TypeVar("ResultT")

_numbers = itertools.count()


def compiled_apart(
    function: Callable[..., ResultT], *, fullgraph: bool, mode: str | None = None
) -> Callable[..., ResultT]:
    """A function through ``torch.compile``, for each shape of its arguments anew.

    The compiler counts what it made of a function, and gives up at a few; whoever asks here has a count of his own, and
    what was compiled for others is not looked through at every call.

    Args:
        fullgraph: whether to fail where the compiler must leave a part as it is, or has made too many.
        mode: of ``torch.compile``.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    twin = types.FunctionType(code, function.__globals__, None, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    compiled: Any = torch.compile(twin, dynamic=False, fullgraph=fullgraph, mode=mode)
    return compiled


def compile_methods(module: nn.Module, names: Sequence[str], *, fullgraph: bool) -> None:
    """Let these methods of a module run through ``torch.compile``, for each shape of their arguments anew.

    A copy of the module runs its own weights: the compiled code belongs to the class, whose modules share it.

    Args:
        names: of methods of its class.
        fullgraph: whether to fail where the compiler must leave a part as it is.
    """
    for name in names:
        compiled = torch.compile(getattr(type(module), name), dynamic=False, fullgraph=fullgraph)
        setattr(module, name, functools.partial(compiled, module))
