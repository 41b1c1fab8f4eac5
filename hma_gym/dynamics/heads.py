"""The protocol between the trunk and a kind of token.

A token head embeds a frame's tokens into trunk positions, and turns the trunk's features back into tokens. The
discrete head (:mod:`hma_gym.dynamics.maskgit`) and the continuous one (:mod:`hma_gym.dynamics.mar`) share this
protocol, so that masking, decoding, rollouts, environments and training know no kind of token.

Shape legend: B rows, T frames, S tokens of a frame (as the tokenizer gives them), N trunk positions (N = S / patch**2),
C channels of a soft token, D width. ``tokens`` are (..., S, C) float for soft and (..., S) int64 for discrete heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hma_gym.nn import noise

#: Draws that are kept apart within one unmasking pass.
PARTS = 64


@dataclass(frozen=True)
class Draw:
    """Where a rollout's random numbers come from: see :mod:`hma_gym.nn.noise`.

    Attributes:
        seed_B, step_B: int64, one pair a row.
        stream: tells the draws of one step apart.
    """

    seed_B: Tensor
    step_B: Tensor
    stream: int

    def part(self, index: int) -> Draw:
        """One of the draws of an unmasking pass, 0 to 63; the last is :meth:`order`."""
        return Draw(self.seed_B, self.step_B, self.stream * PARTS + index)

    def order(self) -> Draw:
        """That of the order of unmasking."""
        return self.part(PARTS - 1)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) uniform numbers in (0, 1)."""
        return noise.uniform(self.seed_B, self.step_B, self.stream, shape)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal numbers."""
        return noise.normal(self.seed_B, self.step_B, self.stream, shape)

    def gumbel(self, *shape: int) -> Tensor:
        """(B, *shape) standard Gumbel numbers."""
        return noise.gumbel(self.seed_B, self.step_B, self.stream, shape)


@dataclass(frozen=True)
class Scene:
    """What is known of a frame before it is made.

    Attributes:
        previous: tokens of the frame before, (..., S...).
        drawn: what the body draws of it, (..., S, C); None, or of no size, with discrete tokens.
    """

    previous: Tensor
    drawn: Tensor | None


class TokenHead(Protocol):
    """What a kind of token must know how to do. Implementations are modules."""

    kind: str
    positions: int
    drawn_size: tuple[int, int, int] | None  # (rows, columns, C) of the tokens that a body can draw

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Weights from the trunk's width to its width, for muP."""
        ...

    def readouts(self) -> list[nn.Parameter]:
        """Weights from the trunk's width to a size that does not grow with it, for muP."""
        ...

    def check(self, tokens: Tensor) -> None:
        """Raises :class:`hma_gym.errors.InvalidArgument` unless these are tokens (B, S...) of this kind and grid."""
        ...

    def embed_previous(self, tokens: Tensor) -> Tensor:
        """Tokens of the previous frame, (B, T, S...), as inputs (B, T, N, D)."""
        ...

    def embed_current(self, tokens: Tensor, masked_BTN: Tensor) -> Tensor:
        """Tokens of the frame itself, masked where told, as inputs (B, T, N, D)."""
        ...

    def embed_drawn(self, drawn: Tensor, before: Tensor) -> Tensor:
        """What the body draws of a frame and of the one before, (B, T, S, C) each, as inputs (B, T, N, D)."""
        ...

    def corrupt(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens with the kind of errors that a rollout makes, same shape."""
        ...

    def loss(
        self, features_BTND: Tensor, tokens: Tensor, scene: Scene, masked_BTN: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over masked positions and detached metrics."""
        ...

    def sample(self, features_BND: Tensor, scene: Scene, draw: Draw, temperature: float) -> tuple[Tensor, Tensor]:
        """One frame's tokens (B, S...) and the order of unmasking, highest first, (B, N).

        Temperature 0 gives the mode (discrete) or the mean (soft).
        """
        ...

    def merge(self, old: Tensor, new: Tensor, masked_BN: Tensor) -> Tensor:
        """``new`` tokens where masked, ``old`` ones elsewhere."""
        ...

    def blank(self, like: Tensor) -> Tensor:
        """Placeholder tokens of the shape of ``like``; their values are never seen."""
        ...
