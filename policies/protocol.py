"""What every policy is: ``reset(mask)`` and ``act(observation) -> action chunks``.

Shape legend: N environments, H actions in a chunk, A action dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Observation = NDArray[np.uint8] | Mapping[str, Any]
"""A batch of observations, N leading: an image array, or a dict of arrays (nested for ``privileged``)."""


@runtime_checkable
class Policy(Protocol):
    """Chooses actions for N environments at once, the same way in ground truth and in a learned env."""

    def reset(self, mask_N: NDArray[np.bool_]) -> None:
        """Forget the episodes of the environments where ``mask_N`` is true; they start anew."""
        ...

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next H >= 1 actions of each environment: float32 (N, H, A) in env units."""
        ...
