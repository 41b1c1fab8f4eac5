"""The discrete token head: factorised vocabularies, masked cross entropy, MaskGIT sampling (HMA, Sections 3.3, 3.5).

Shape legend: see :mod:`hma_gym.dynamics.heads`; V factors of the vocabulary, F sum of their sizes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.dynamics.heads import Draw, Scene
from hma_gym.errors import InvalidArgument
from hma_gym.nn.parameters import weight_of
from hma_gym.nn.patches import from_patches, to_patches
from hma_gym.nn.vocabulary import join_factors, split_factors
from hma_gym.tokenizers.protocol import check_vq_tokens

Order = Literal["random", "confidence"]


@dataclass(frozen=True)
class MaskGITHeadConfig:
    """Geometry and training of the discrete head.

    Attributes:
        grid: (rows, columns) of the token grid; S = rows * columns.
        vocabulary: sizes of the factors; a token is a mixed-radix number of them, e.g. (512, 512) for 2**18 codes.
        patch: side of the square of tokens that share a trunk position.
        corrupt_max: context corruption: a share, uniform in [0, corrupt_max], of the previous frame's tokens is
            replaced by random ones.
        order: which tokens are unmasked first; ``confidence`` adds Gumbel noise times the temperature.
    """

    grid: tuple[int, int] = (8, 8)
    vocabulary: tuple[int, ...] = (8, 5, 5, 5)
    patch: int = 1
    corrupt_max: float = 0.2
    order: Order = "random"

    def __post_init__(self) -> None:
        if self.grid[0] % self.patch or self.grid[1] % self.patch:
            raise InvalidArgument(
                f"discrete head: patch must divide the grid, got patch={self.patch}, grid={self.grid}."
            )
        if self.order not in ("random", "confidence"):
            raise InvalidArgument(f"discrete head: order must be 'random' or 'confidence', got {self.order!r}.")


class FactorisedEmbedding(nn.Module):
    """A token's embedding is the sum of its factors' embeddings; a patch's is a projection of its tokens'."""

    def __init__(self, vocabulary: tuple[int, ...], patch: int, width: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in vocabulary)
        self.join = nn.Linear(patch**2 * width, width) if patch > 1 else nn.Identity()

    def forward(self, patches: Tensor) -> Tensor:
        """(..., N, patch**2) int64 -> (..., N, D)."""
        factors = split_factors(patches, self.vocabulary)
        embedded = functools.reduce(torch.add, [table(factors[..., i]) for i, table in enumerate(self.tables)])
        joined: Tensor = self.join(embedded.flatten(-2))
        return joined


class MaskGITHead(nn.Module):
    """Discrete tokens in, discrete tokens out. Implements :class:`hma_gym.dynamics.heads.TokenHead`."""

    kind = "vq"

    def __init__(self, config: MaskGITHeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        self.positions = rows * columns // config.patch**2
        self.drawn_size: tuple[int, int, int] | None = None
        self.previous_in = FactorisedEmbedding(config.vocabulary, config.patch, width)
        self.current_in = FactorisedEmbedding(config.vocabulary, config.patch, width)
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self.logits_out = nn.Linear(width, config.patch**2 * sum(config.vocabulary))
        nn.init.zeros_(self.logits_out.weight)
        nn.init.zeros_(self.logits_out.bias)

    def hidden_matrices(self) -> list[nn.Parameter]:
        joins = (self.previous_in.join, self.current_in.join)
        return [weight_of(join) for join in joins if isinstance(join, nn.Linear)]

    def readouts(self) -> list[nn.Parameter]:
        return [weight_of(self.logits_out)]

    def check(self, tokens: Tensor) -> None:
        check_vq_tokens(tokens, self.config.grid[0] * self.config.grid[1])

    def _patch(self, tokens: Tensor) -> Tensor:
        return to_patches(tokens[..., None], self.config.grid, self.config.patch)

    def _unpatch(self, patches: Tensor) -> Tensor:
        return from_patches(patches, self.config.grid, self.config.patch)[..., 0]

    def embed_previous(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.previous_in(self._patch(tokens))
        return embedded

    def embed_current(self, tokens: Tensor, masked_BTN: Tensor) -> Tensor:
        embedded = self.current_in(self._patch(tokens))
        return torch.where(masked_BTN[..., None], self.mask_embedding.to(embedded.dtype), embedded)

    def embed_drawn(self, drawn: Tensor, before: Tensor) -> Tensor:
        """No body draws discrete tokens: nothing is added."""
        return drawn.new_zeros(())

    def corrupt(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        device = tokens.device
        share = torch.rand(tokens.shape[0], *(1,) * (tokens.ndim - 1), generator=generator, device=device)
        hit = torch.rand(tokens.shape, generator=generator, device=device) < self.config.corrupt_max * share
        codes = math.prod(self.config.vocabulary)
        return torch.where(hit, torch.randint(codes, tokens.shape, generator=generator, device=device), tokens)

    def _logits(self, features: Tensor) -> list[Tensor]:
        """One float32 tensor a factor, (..., N, patch**2, size)."""
        logits = rearrange(self.logits_out(features).float(), "... (p f) -> ... p f", p=self.config.patch**2)
        return list(logits.split(list(self.config.vocabulary), dim=-1))

    def loss(
        self, features_BTND: Tensor, tokens: Tensor, scene: Scene, masked_BTN: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        target = self._patch(tokens)
        factors = split_factors(target, self.config.vocabulary)
        loss = torch.zeros(target.shape, device=target.device)
        right = torch.ones_like(target, dtype=torch.bool)
        for i, logits in enumerate(self._logits(features_BTND)):
            loss = loss + F.cross_entropy(logits.flatten(0, -2), factors[..., i].flatten(), reduction="none").view(
                target.shape
            )
            right = right & (logits.argmax(dim=-1) == factors[..., i])
        masked = masked_BTN[..., None].expand_as(target).float()
        changed = masked * (target != self._patch(scene.previous)).float()
        mean = (loss * masked).sum() / masked.sum().clamp(min=1)
        return mean, {
            "cross_entropy": mean.detach(),
            "accuracy": (right * masked).sum() / masked.sum().clamp(min=1),
            "changed_accuracy": (right * changed).sum() / changed.sum().clamp(min=1),
            "changed_share": changed.sum() / masked.sum().clamp(min=1),
        }

    def sample(self, features_BND: Tensor, scene: Scene, draw: Draw, temperature: float) -> tuple[Tensor, Tensor]:
        factors = []
        confidence_BN = torch.zeros(features_BND.shape[:2], device=features_BND.device)
        for i, logits in enumerate(self._logits(features_BND)):
            scores = logits
            if temperature > 0:
                noise = draw.part(i).gumbel(*logits.shape[1:])
                scores = logits / temperature + noise
            choice = scores.argmax(dim=-1)
            factors.append(choice)
            if self.config.order == "confidence":
                log_probability = logits.log_softmax(dim=-1).gather(-1, choice[..., None])[..., 0]
                confidence_BN = confidence_BN + log_probability.sum(dim=-1)
        tokens = self._unpatch(join_factors(torch.stack(factors, dim=-1), self.config.vocabulary))
        if self.config.order == "random":
            confidence_BN = draw.order().uniform(confidence_BN.shape[1])
        elif temperature > 0:
            noise_BN = draw.order().gumbel(confidence_BN.shape[1])
            confidence_BN = confidence_BN + temperature * noise_BN
        return tokens, confidence_BN

    def merge(self, old: Tensor, new: Tensor, masked_BN: Tensor) -> Tensor:
        return self._unpatch(torch.where(masked_BN[..., None], self._patch(new), self._patch(old)))

    def blank(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)
