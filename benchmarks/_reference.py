"""A checkout of the reference implementation (github.com/liruiw/HMA) as a module to time and to compare with.

Nothing of it is part of this package; who wants the comparison gives a path. Its imports that are not installed are
stood in for: xformers by PyTorch's own fused attention, mup and transformers by the names that it takes from them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.errors import InvalidArgument

#: ``plain`` is the reference's own code without xformers; ``fused`` calls xformers, or stands in for it.
ReferenceAttention = Literal["plain", "fused"]


@dataclass(frozen=True)
class Reference:
    """The two classes of the reference that are needed, and where they come from."""

    model: Any
    config: Any
    path: Path


class _Readout(nn.Linear):
    """Stands in for a class that the reference derives one from, and uses with muP only."""


class _Output(dict[str, Any]):
    """Stands in for a dict of outputs of training."""


class _LowerTriangularMask:
    """Stands in for xformers' causal mask."""


def _memory_efficient_attention(
    q_BNHK: Tensor, k_BNHK: Tensor, v_BNHK: Tensor, attn_bias: object = None, scale: float | None = None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BNHK, k_BNHK, v_BNHK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=attn_bias is not None, scale=scale).transpose(1, 2)


def _stand_ins() -> dict[str, types.ModuleType]:
    """Modules by name for what the reference imports and is not installed."""
    names: dict[str, dict[str, object]] = {
        "xformers": {},
        "xformers.ops": {
            "LowerTriangularMask": _LowerTriangularMask,
            "memory_efficient_attention": _memory_efficient_attention,
            "unbind": torch.unbind,
        },
        "mup": {"MuReadout": _Readout},
        "transformers": {},
        "transformers.utils": {"ModelOutput": _Output},
    }
    found = {name: importlib.util.find_spec(name.partition(".")[0]) is not None for name in names}
    modules = {name: types.ModuleType(name) for name in names if not found[name]}
    for name, module in modules.items():
        for attribute, value in names[name].items():
            setattr(module, attribute, value)
    return modules


@contextmanager
def _importable(path: Path, attention: ReferenceAttention) -> Iterator[None]:
    modules = _stand_ins()
    before = os.environ.get("XFORMERS_DISABLED")
    os.environ["XFORMERS_DISABLED"] = "true" if attention == "plain" else "false"
    sys.path.insert(0, str(path))
    sys.modules.update(modules)
    try:
        yield
    finally:
        sys.path.remove(str(path))
        for name in [*modules, *(n for n in sys.modules if n == "hma" or n.startswith("hma."))]:
            del sys.modules[name]
        if before is None:
            del os.environ["XFORMERS_DISABLED"]
        else:
            os.environ["XFORMERS_DISABLED"] = before


def load_reference(path: str | Path, attention: ReferenceAttention) -> Reference:
    """Import the model and configuration classes of a checkout.

    Raises:
        InvalidArgument: no such checkout.
    """
    path = Path(path).resolve()
    if not (path / "hma" / "model" / "st_mask_git.py").exists():
        raise InvalidArgument(
            f"reference must be a checkout of github.com/liruiw/HMA (with hma/model/st_mask_git.py), got {str(path)!r}."
        )
    with _importable(path, attention):
        model = importlib.import_module("hma.model.st_mask_git").STMaskGIT
        config = importlib.import_module("hma.config").GenieConfig
    return Reference(model, config, path)


#: The fields of the published configurations that are not the geometry.
PUBLISHED_FIELDS: dict[str, Any] = {
    "use_mup": False,
    "action_network": "concat+modulate",
    "num_factored_vocabs": 2,
    "qkv_bias": False,
    "qk_norm": False,
}


def random_reference(
    reference: Reference, fields: dict[str, Any], domain: str, action_size: int, seed: int, noise: float = 0.02
) -> Any:
    """A model of the reference with random weights, none of them zero or one, so that each has its effect.

    Args:
        fields: of its configuration: num_layers, num_heads, d_model, T, S, image_vocab_size ...
        domain: name of its one domain, with ``action_size`` numbers an action.
        noise: standard deviation of what is added to the initial weights.
    """
    statistics = [[0.1 * i for i in range(action_size)], [0.5 + 0.1 * i for i in range(action_size)]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = reference.model(
            reference.config(
                **PUBLISHED_FIELDS,
                **fields,
                action_domains=[domain],
                d_actions=[action_size],
                action_stats=[statistics],
            )
        )
        for parameter in model.parameters():
            parameter.data += noise * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)
