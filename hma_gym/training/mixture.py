"""Mixture sampling over domains: which domain each row of a batch comes from, as a pure function of (seed, step).

HMA (arXiv 2502.04296, Section 4) evens out datasets of very different sizes by inverse-exponential weights; its public
code draws domain i with probability proportional to ``n_i ** (1 / T)``, n_i its number of clips and T = 3. T = 1 is in
proportion to the sizes; the larger T, the more even.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import InvalidArgument


def mixture_probabilities(sizes: Mapping[str, int], temperature: float = 3.0) -> dict[str, float]:
    """Each domain's share of the rows, proportional to ``size ** (1 / temperature)``.

    Args:
        sizes: clips (or frames) of each domain, 1 or more.
        temperature: T > 0; ``math.inf`` for equal shares.
    """
    if not sizes or any(size < 1 for size in sizes.values()):
        raise InvalidArgument(f"sizes must name one domain or more with 1 clip or more each, got {dict(sizes)}.")
    if not temperature > 0:
        raise InvalidArgument(f"temperature must be positive, got {temperature}; math.inf gives equal shares.")
    logs = np.log(np.array(list(sizes.values()), dtype=np.float64)) / temperature
    weights = np.exp(logs - logs.max())
    return dict(zip(sizes, (weights / weights.sum()).tolist(), strict=True))


@dataclass(frozen=True)
class Mixture:
    """Assigns the rows of each batch to domains.

    The draw is systematic (one uniform offset a step): each domain gets its expected number of rows rounded up or down,
    and its exact share in the long run, which keeps the loss less noisy than independent draws.

    Attributes:
        sizes: clips of each domain.
        temperature: see :func:`mixture_probabilities`.
        seed: of the draw.
        probabilities: each domain's share, in the order of ``sizes``.
    """

    sizes: Mapping[str, int]
    temperature: float = 3.0
    seed: int = 0
    probabilities: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", mixture_probabilities(self.sizes, self.temperature))

    def rows(self, step: int, batch_size: int) -> NDArray[np.int64]:
        """The domain of each row of batch ``step``: (B,) indices into ``sizes``, rising."""
        if batch_size < 1:
            raise InvalidArgument(f"batch_size must be 1 or more, got {batch_size}.")
        offset = np.random.default_rng((self.seed, step)).random()
        points_B = (np.arange(batch_size) + offset) / batch_size
        edges = np.cumsum(list(self.probabilities.values()))
        edges[-1] = math.inf
        return np.searchsorted(edges, points_B, side="right").astype(np.int64)

    def counts(self, step: int, batch_size: int) -> dict[str, int]:
        """How many rows of batch ``step`` each domain gives."""
        counts = np.bincount(self.rows(step, batch_size), minlength=len(self.sizes))
        return dict(zip(self.sizes, counts.tolist(), strict=True))
