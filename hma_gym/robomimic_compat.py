"""The one way to import robomimic: makes torchvision importable first.

robomimic's image encoders need torchvision. The wheels of torchvision on PyPI hold compiled operators for CUDA
builds of torch; beside a CPU-only torch these do not load, and ``import torchvision`` stops at "operator
torchvision::nms does not exist", for it registers Python kernels for operators that nobody declared. Declaring
the two schemas is enough: robomimic uses the networks and image transforms, which are plain torch, and no box
operator.

This module imports torch: import it at the point of use.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from hma_gym.extras import require

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@functools.cache
def make_torchvision_importable() -> torch.library.Library | None:
    """Import torchvision, declaring first the operator schemas that its compiled part could not bring.

    Returns:
        the library that holds the declared operators (they live as long as it does, and the cache keeps it), or
        None where torchvision's own operators load.

    Raises:
        MissingExtra: torchvision is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    library = None
    if spec is not None and spec.origin is not None and not _loads(Path(spec.origin).with_name("_C.so")):
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
    require("torchvision", extra="robomimic", purpose="robomimic's image encoders")
    return library


def _loads(compiled: Path) -> bool:
    try:
        torch.ops.load_library(compiled)
    except OSError:
        return False
    return True


def import_robomimic(module: str = "robomimic", *, purpose: str) -> ModuleType:
    """Import robomimic or one of its modules.

    Args:
        module: dotted name, ``"robomimic"`` or below.
        purpose: what needs it, in words that end the sentence "... is needed for".

    Raises:
        MissingExtra: robomimic or torchvision is not installed.
    """
    make_torchvision_importable()
    return require(module, extra="robomimic", purpose=purpose)
