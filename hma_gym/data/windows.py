"""Training windows: clips of consecutive frames, drawn from token caches as a pure function of the step.

Shape legend: B rows, T transitions of a clip (T + 1 frames), A action dims, P agent_pos dims, X target dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hma_gym.data.cache import TokenCache
from hma_gym.domains import Domain
from hma_gym.errors import DatasetError, InvalidArgument


@dataclass(frozen=True)
class ClipConfig:
    """How clips are drawn.

    Attributes:
        batch_size: B.
        frames: T, transitions of a clip.
        seed: of the draw.
        category_weight: how many times more often episodes of a category are drawn, as (name, weight) pairs;
            1 for the others.
        margin: draw clips at the edges of an episode more often, as if it were longer by ``margin`` transitions. Where
            a model trains on a random part of each clip, up to ``margin`` into it, this evens out how often each frame
            is trained on; without it the first and the last frames, which show the outcome, hardly are.
    """

    batch_size: int = 8
    frames: int = 16
    seed: int = 0
    category_weight: tuple[tuple[str, float], ...] = ()
    margin: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.frames < 1 or self.margin < 0:
            raise InvalidArgument(
                "clips: batch_size and frames must be positive and margin not negative, got "
                f"batch_size={self.batch_size}, frames={self.frames}, margin={self.margin}."
            )


class ClipBatches:
    """Batches of clips from one or more domains.

    Args:
        caches: one token cache a domain.
        domains: the domains, in the model's order; their dims must be those of the caches.
        config: how clips are drawn.
        split: which episodes.
        mixture: share of each domain in a batch; equal shares by default.

    Raises:
        DatasetError: dims disagree with the domain, or no episode of the split is as long as a clip.
    """

    def __init__(
        self,
        caches: Sequence[TokenCache],
        domains: Sequence[Domain],
        config: ClipConfig,
        split: str = "train",
        mixture: Sequence[float] | None = None,
    ) -> None:
        self.caches, self.domains, self.config = tuple(caches), tuple(domains), config
        self.mixture = np.asarray(mixture if mixture is not None else [1.0] * len(caches), dtype=np.float64)
        self.mixture = self.mixture / self.mixture.sum()
        weights = dict(config.category_weight)
        self.episodes: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        for cache, domain in zip(self.caches, self.domains, strict=True):
            check_domain(cache, domain)
            episodes = cache.episodes(split)
            room = np.diff(cache.starts_N1)[episodes] - config.frames * domain.stride
            episodes = episodes[room > 0]
            if not len(episodes):
                raise DatasetError(
                    f"no {split} episode of domain {domain.name!r} is longer than a clip of {config.frames} transitions"
                    f" (stride {domain.stride}); shorten the clip or record longer episodes."
                )
            self.episodes.append(episodes)
            # every possible clip is equally likely, but for the category weights
            weight = room[room > 0] * np.array([weights.get(cache.category_N[n], 1.0) for n in episodes])
            self.weights.append(np.cumsum(weight / weight.sum()))
        self.widest = max(domain.action_dim * domain.stride for domain in domains)
        self.state = max(domain.state_dim for domain in domains)
        self.target = max(domain.target_dim for domain in domains)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, padded to the widest domain.

        ``tokens`` (B, T + 1, S...), ``actions`` (B, T, A), ``agent_pos`` (B, T + 1, P), ``targets`` (B, T + 1, X),
        ``domain`` (B,) and ``at_rest`` (B,): the clip begins where an episode does.
        """
        rng = np.random.default_rng((self.config.seed, step))
        B, T = self.config.batch_size, self.config.frames
        domain_B = np.searchsorted(np.cumsum(self.mixture), rng.random(B) * (1 - 1e-12))
        tokens: list[np.ndarray] = []
        actions = np.zeros((B, T, self.widest), np.float32)
        agent_pos = np.zeros((B, T + 1, self.state), np.float32)
        targets = np.zeros((B, T + 1, self.target), np.float32)
        at_rest = np.zeros(B, bool)
        for row, index in enumerate(domain_B):
            cache, stride = self.caches[index], self.domains[index].stride
            draw = rng.random() * (1 - 1e-12)
            episode = int(self.episodes[index][np.searchsorted(self.weights[index], draw)])
            rows = cache.rows(episode)
            first = rows.start + self._first(rng, rows.stop - rows.start - T * stride, stride)
            at_rest[row] = first == rows.start
            frames = slice(first, first + T * stride + 1, stride)
            tokens.append(cache.tokens[frames])
            chunk = cache.actions_FA[first : first + T * stride].reshape(T, -1)
            actions[row, :, : chunk.shape[1]] = chunk
            agent_pos[row, :, : cache.agent_pos_FP.shape[1]] = cache.agent_pos_FP[frames]
            targets[row, :, : cache.targets_FX.shape[1]] = cache.targets_FX[frames]
        stacked = np.stack(tokens)
        return {
            "tokens": torch.from_numpy(stacked.astype(np.float32 if stacked.dtype.kind == "f" else np.int64)),
            "actions": torch.from_numpy(actions),
            "agent_pos": torch.from_numpy(agent_pos),
            "targets": torch.from_numpy(targets),
            "domain": torch.from_numpy(domain_B.astype(np.int64)),
            "at_rest": torch.from_numpy(at_rest),
        }

    def _first(self, rng: np.random.Generator, room: int, stride: int) -> int:
        """Where a clip begins, in [0, room)."""
        margin = self.config.margin * stride
        return int(np.clip(rng.integers(room + margin) - margin // 2, 0, room - 1))


def check_domain(cache: TokenCache, domain: Domain) -> None:
    """Raises :class:`DatasetError` where the dims of a cache are not those of its domain."""
    for name, got, want in (
        ("actions", cache.actions_FA.shape[1], domain.action_dim),
        ("agent_pos", cache.agent_pos_FP.shape[1], domain.state_dim),
        ("targets", cache.targets_FX.shape[1], domain.target_dim),
    ):
        if got != want:
            raise DatasetError(
                f"domain {domain.name!r} has {want} dims of {name}, the dataset {got}; "
                "compute the domain from this dataset, or train on the dataset that it describes."
            )
