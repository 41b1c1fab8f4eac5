"""The classifier judge: a small temporal convolutional network over the last K frames.

One output is the logit of success in the current frame, one the position of the task's object, so that where a
generated video puts the cube can be measured in metres.

- Each frame is encoded alone (about 10 MFLOP at 64 x 64): patches of 4 x 4 pixels first, so that no layer runs at a
  resolution at which a CPU is slow. The K codes are mixed by a convolution over time as long as the window.
- A frame's code depends on that frame only, so an environment lets each frame be read once (:class:`FrameCoder
  <hma_gym.judges.protocol.FrameCoder>`).

Shape legend: B batch, K window, H W image, D code width, X position dims (3, metres).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hma_gym.errors import CheckpointError, InvalidArgument, InvalidImage
from hma_gym.judges.protocol import check_window
from hma_gym.judges.trained import TrainedConfig, TrainedJudge, fill, read_trained, save_trained


@dataclass(frozen=True)
class ClassifierConfig(TrainedConfig):
    """Shape and calibration of a classifier judge.

    Attributes, beside those of every trained judge:
        image_size: (height, width) in pixels, multiples of 8.
        channels: widths of the three convolutions (at 1/4, 1/8 and 1/8 of the resolution).
        width: D, size of a frame's code.
    """

    name: str = "classifier"
    image_size: tuple[int, int] = (64, 64)
    channels: tuple[int, int, int] = (48, 64, 64)
    width: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or min(self.channels) < 1:
            raise InvalidArgument(
                f"a classifier judge needs width and channels of at least 1, got width={self.width}, "
                f"channels={self.channels}."
            )
        if any(side < 8 or side % 8 for side in self.image_size):
            raise InvalidArgument(f"image_size must be multiples of 8 pixels, got {self.image_size}.")


class ClassifierJudge(TrainedJudge):
    """A trained or fresh classifier; satisfies :class:`~hma_gym.judges.protocol.FrameCoder`."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.config = config
        low, middle, high = config.channels
        self.encoder = nn.Sequential(
            nn.Conv2d(3, low, 4, stride=4),
            nn.GELU(),
            nn.Conv2d(low, middle, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(middle, high, 3, padding=1),
            nn.GELU(),
        )
        cells = (config.image_size[0] // 8) * (config.image_size[1] // 8)
        self.project = nn.Linear(high * cells, config.width)
        self.mix = nn.Conv1d(config.width, config.width, config.window)
        self.hidden = nn.Linear(2 * config.width, config.width)
        self.logit_head = nn.Linear(config.width, 1)
        self.position_head = nn.Linear(config.width, 3)

    @property
    def code_size(self) -> int:
        """D, numbers of a frame's code."""
        return self.config.width

    def forward(self, frames_BKCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Float frames in [-1, 1] to the uncalibrated logit (B,) and the standardised position (B, 3)."""
        batch, window = frames_BKCHW.shape[:2]
        return self._read_codes(self._codes(frames_BKCHW.flatten(0, 1)).reshape(batch, window, -1))

    def _codes(self, frames_BCHW: Tensor) -> Tensor:
        """Each frame alone: (B, D)."""
        codes_BD: Tensor = F.gelu(self.project(self.encoder(frames_BCHW).flatten(1)))
        return codes_BD

    def _read_codes(self, codes_BKD: Tensor) -> tuple[Tensor, Tensor]:
        mixed_BD = F.gelu(self.mix(codes_BKD.transpose(1, 2)).squeeze(-1))
        hidden_BD = F.gelu(self.hidden(torch.cat([mixed_BD, codes_BKD[:, -1]], dim=-1)))
        return self.logit_head(hidden_BD).squeeze(-1), self.position_head(hidden_BD)

    def _scaled(self, frames: Tensor) -> Tensor:
        """(..., H, W, 3) uint8 to (..., 3, H, W) in [-1, 1]."""
        if tuple(frames.shape[-3:]) != (*self.config.image_size, 3):
            raise InvalidImage(
                f"judge {self.name!r} needs frames of {self.config.image_size} pixels in 3 channels, got "
                f"{tuple(frames.shape[-3:])}; resize them first."
            )
        return frames.movedim(-1, -3).to(self.position_mean) * (2 / 255) - 1

    def _read(self, frames_BKHWC: Tensor) -> tuple[Tensor, Tensor]:
        check_window(self, frames_BKHWC)
        logit, position = self(self._scaled(frames_BKHWC))
        return logit, position

    @torch.inference_mode()
    def probability(self, frames_BKHWC: Tensor) -> Tensor:
        """Calibrated probability of success in the current (last) frame: (B,) float32."""
        return self._probability(self._read(frames_BKHWC)[0])

    @torch.inference_mode()
    def position(self, frames_BKHWC: Tensor) -> Tensor:
        """Where the object is in the current (last) frame, metres in the world frame: (B, 3) float32."""
        return self._metres(self._read(frames_BKHWC)[1])

    @torch.inference_mode()
    def code(self, frames_BHWC: Tensor) -> Tensor:
        """Frames (B, H, W, 3) uint8, each alone, to codes (B, D) float32."""
        return self._codes(self._scaled(frames_BHWC)).float()

    @torch.inference_mode()
    def probability_of_codes(self, codes_BKD: Tensor) -> Tensor:
        """As :meth:`probability`, from the codes of the window's frames, oldest first."""
        return self._probability(self._read_codes(codes_BKD)[0])


def build_classifier(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ClassifierJudge:
    """A judge from :meth:`ClassifierConfig.to_dict` and :meth:`ClassifierJudge.tensors`, on the CPU, for inference.

    Raises:
        CheckpointError: unknown or invalid config, or tensors that do not fit it.
    """
    try:
        judge = ClassifierJudge(ClassifierConfig.from_dict(config))
    except InvalidArgument as error:
        raise CheckpointError(f"judge: its stored config is invalid: {error}") from error
    return fill(judge, tensors)


def save_judge(judge: ClassifierJudge, folder: str | Path) -> Path:
    """Write ``judge.safetensors`` and ``judge.json`` into a folder (made if needed), and return it.

    Raises:
        StorageError: the folder cannot be written.
    """
    return save_trained(judge, folder, "judge")


def load_judge(folder: str | Path) -> ClassifierJudge:
    """Read what :func:`save_judge` wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or they do not fit together.
    """
    return build_classifier(*read_trained(folder, "judge", "hma-gym train judge"))
