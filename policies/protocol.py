"""What every policy is: ``reset(mask)`` and ``act(observation) -> action chunks``.

Whoever runs a policy carries out all H actions of a chunk before it asks for the next, and shows the observations in
between to a policy that watches (:class:`WatchingPolicy`).

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


@runtime_checkable
class WatchingPolicy(Policy, Protocol):
    """A policy with a memory of observations: it wants also those between its chunks."""

    def observe(self, observation: Observation) -> None:
        """Take note of one step's observations; the next :meth:`act` brings the step after it."""
        ...
