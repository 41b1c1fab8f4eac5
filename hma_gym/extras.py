"""The one gate for optional packages.

>>> mujoco = require("mujoco", extra="sim", purpose="the ground-truth environments")  # doctest: +SKIP

Nothing else in hma_gym catches ``ImportError``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from hma_gym.errors import MissingExtra


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, or raise :class:`MissingExtra` with the exact pip line.

    Args:
        module: dotted name of the module to import.
        extra: the extra of hma_gym that brings it (``sim``, ``robomimic``, ``rl`` ...).
        purpose: what needs it, in words that end the sentence "... is needed for".
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing.split(".")[0] == "hma_gym":
            raise
        raise MissingExtra(
            f"the package {missing!r} is needed for {purpose} and is not installed; "
            f'install it with: pip install "hma_gym[{extra}]"'
        ) from error
