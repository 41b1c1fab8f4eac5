"""The feature judge: success read from a learned world's own tokens, so that large batches need no decoding.

The tokens of a frame are all that the dynamics model says of it; the decoder adds nothing. A frame's tokens go through
two linear layers, 1/60 of what the classifier spends on its pixels, and the codes of the last K frames are mixed as the
classifier mixes its own. It knows the tokens of one tokenizer only.

Shape legend: B batch, K window, S tokens of a frame, C channels of a soft token or digits of a vq one, E = S * C,
D code width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hma_gym.errors import CheckpointError, InvalidArgument
from hma_gym.judges.trained import TrainedConfig, TrainedJudge, fill, read_trained, save_trained
from hma_gym.nn.vocabulary import split_factors
from hma_gym.tokenizers.protocol import Tokenizer


@dataclass(frozen=True)
class FeatureConfig(TrainedConfig):
    """Shape and calibration of a feature judge.

    Attributes, beside those of every trained judge:
        tokens: S.
        channels: C of soft tokens; 0 for vq.
        vocabulary: factor sizes of vq tokens; () for soft.
        hidden: width of the layer between a frame's tokens and its code.
        width: D, size of a frame's code.
    """

    name: str = "feature"
    tokens: int = 64
    channels: int = 8
    vocabulary: tuple[int, ...] = ()
    hidden: int = 256
    width: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tokens, self.hidden, self.width) < 1 or (self.channels > 0) == bool(self.vocabulary):
            raise InvalidArgument(
                "a feature judge needs tokens, hidden and width of at least 1, and channels or a vocabulary, got "
                f"tokens={self.tokens}, hidden={self.hidden}, width={self.width}, channels={self.channels}, "
                f"vocabulary={self.vocabulary}."
            )

    @property
    def frame_size(self) -> int:
        """E, numbers of a frame."""
        return self.tokens * (self.channels or len(self.vocabulary))


class FeatureJudge(TrainedJudge):
    """A trained or fresh feature judge; satisfies :class:`~hma_gym.judges.protocol.TokenJudge`."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__(config)
        self.config = config
        self.encoder = nn.Sequential(
            nn.Linear(config.frame_size, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.width), nn.GELU()
        )
        self.mix = nn.Linear(config.window * config.width, config.width)
        self.hidden = nn.Linear(2 * config.width, config.width)
        self.logit_head = nn.Linear(config.width, 1)
        self.position_head = nn.Linear(config.width, 3)

    def forward(self, frames_BKE: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`numbers` gives to the uncalibrated logit (B,) and the standardised position (B, 3)."""
        codes_BKD = self.encoder(frames_BKE)
        mixed_BD = F.gelu(self.mix(codes_BKD.flatten(1)))
        hidden_BD = F.gelu(self.hidden(torch.cat([mixed_BD, codes_BKD[:, -1]], dim=-1)))
        return self.logit_head(hidden_BD).squeeze(-1), self.position_head(hidden_BD)

    def numbers(self, tokens_BK: Tensor) -> Tensor:
        """Tokens (B, K, S, C) or (B, K, S) to what the network reads: (B, K, E), of order one.

        Raises:
            InvalidArgument: tokens of another kind or shape.
        """
        config = self.config
        soft = not config.vocabulary
        shape = (config.window, config.tokens, *((config.channels,) if soft else ()))
        if tuple(tokens_BK.shape[1:]) != shape or tokens_BK.is_floating_point() != soft:
            raise InvalidArgument(
                f"judge {self.name!r} needs {'floating' if soft else 'integer'} tokens of shape (B, "
                f"{', '.join(map(str, shape))}), got {tokens_BK.dtype} with shape {tuple(tokens_BK.shape)}; it reads "
                "the tokenizer that it was trained with."
            )
        if soft:
            return tokens_BK.flatten(2).to(self.position_mean)
        digits_BKSC = split_factors(tokens_BK, config.vocabulary).to(self.position_mean)
        largest_C = torch.tensor(config.vocabulary, device=tokens_BK.device) - 1
        return (digits_BKSC * (2 / largest_C.clamp_min(1)) - 1).flatten(2)

    @torch.inference_mode()
    def probability_of_tokens(self, tokens_BK: Tensor) -> Tensor:
        """Calibrated probability of success in the current (last) frame: (B,) float32."""
        return self._probability(self(self.numbers(tokens_BK))[0])

    @torch.inference_mode()
    def position_of_tokens(self, tokens_BK: Tensor) -> Tensor:
        """Where the object is in the current (last) frame, metres in the world frame: (B, 3) float32."""
        return self._metres(self(self.numbers(tokens_BK))[1])


class EncodedFrames:
    """A feature judge for frames, which a tokenizer encodes first; satisfies :class:`~hma_gym.judges.protocol.Judge`.

    Slower than the classifier: for comparing judges on recorded videos, not for environments.
    """

    def __init__(self, judge: FeatureJudge, tokenizer: Tokenizer) -> None:
        self.judge, self.tokenizer = judge, tokenizer
        self.name, self.window, self.threshold = judge.name, judge.window, judge.threshold

    def probability(self, frames_BKHWC: Tensor) -> Tensor:
        """(B, K, H, W, C) uint8, oldest first, to (B,) float32."""
        return self.judge.probability_of_tokens(self.tokenizer.encode(frames_BKHWC))


def build_feature_judge(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FeatureJudge:
    """A judge from :meth:`FeatureConfig.to_dict` and :meth:`FeatureJudge.tensors`, on the CPU, for inference.

    Raises:
        CheckpointError: unknown or invalid config, or tensors that do not fit it.
    """
    try:
        judge = FeatureJudge(FeatureConfig.from_dict(config))
    except InvalidArgument as error:
        raise CheckpointError(f"judge: its stored config is invalid: {error}") from error
    return fill(judge, tensors)


def save_feature_judge(judge: FeatureJudge, folder: str | Path) -> Path:
    """Write ``feature_judge.safetensors`` and ``feature_judge.json`` into a folder (made if needed), and return it.

    Raises:
        StorageError: the folder cannot be written.
    """
    return save_trained(judge, folder, "feature_judge")


def load_feature_judge(folder: str | Path) -> FeatureJudge:
    """Read what :func:`save_feature_judge` wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or they do not fit together.
    """
    return build_feature_judge(*read_trained(folder, "feature_judge", "hma-gym train feature-judge"))
