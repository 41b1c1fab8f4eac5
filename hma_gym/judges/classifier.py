"""The classifier judge: a small temporal convolutional network over the last K frames.

One output is the logit of success in the current frame, one the position of the task's object, so that where a
generated video puts the cube can be measured in metres.

- Each frame is encoded alone (about 10 MFLOP at 64 x 64): patches of 4 x 4 pixels first, so that no layer runs at a
  resolution at which a CPU is slow. The K codes are mixed by a convolution over time as long as the window.
- A frame's code depends on that frame only, so an environment lets each frame be read once (:class:`FrameCoder
  <hma_gym.judges.protocol.FrameCoder>`).
- It may be told ``agent_pos`` beside the frames (``state_dim``): a cube that has just fallen lies in line of sight with
  the hand, and only where the hand is says that it is not in it. Where it is not told, it judges by the picture alone.

Shape legend: B batch, K window, H W image, D code width, P agent_pos dims that it is told (0: none), S = P + 1 numbers
that a code says of agent_pos (0 where P is), X position dims (3, metres).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hma_gym.errors import CheckpointError, InvalidArgument, InvalidImage
from hma_gym.judges.protocol import check_agent_pos, check_window
from hma_gym.judges.trained import TrainedConfig, TrainedJudge, fill, read_trained, save_trained
from hma_gym.nn.parameters import silence
from hma_gym.nn.waves import waves

#: Octaves of the finest waves that tell agent_pos: a quarter of a standard deviation is half a wave.
OCTAVES = 4

#: Standard deviations from the mean beyond which agent_pos is told no further.
REACH = 5.0


@dataclass(frozen=True)
class ClassifierConfig(TrainedConfig):
    """Shape and calibration of a classifier judge.

    Attributes, beside those of every trained judge:
        image_size: (height, width) in pixels, multiples of 8.
        channels: widths of the three convolutions (at 1/4, 1/8 and 1/8 of the resolution).
        width: D, size of a frame's code of the picture.
        state_dim: P, dims of agent_pos that it is told; 0 for frames alone.
        state_mean, state_std: statistics of agent_pos in its own units, P values each.
    """

    name: str = "classifier"
    image_size: tuple[int, int] = (64, 64)
    channels: tuple[int, int, int] = (48, 64, 64)
    width: int = 128
    state_dim: int = field(default=0, kw_only=True)
    state_mean: tuple[float, ...] = field(default=(), kw_only=True)
    state_std: tuple[float, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or min(self.channels) < 1:
            raise InvalidArgument(
                f"a classifier judge needs width and channels of at least 1, got width={self.width}, "
                f"channels={self.channels}."
            )
        if any(side < 8 or side % 8 for side in self.image_size):
            raise InvalidArgument(f"image_size must be multiples of 8 pixels, got {self.image_size}.")
        lengths = (len(self.state_mean), len(self.state_std))
        if self.state_dim < 0 or lengths != (self.state_dim,) * 2 or any(not std > 0 for std in self.state_std):
            raise InvalidArgument(
                "state_mean and state_std must be state_dim values each, and each std above 0, got "
                f"state_dim={self.state_dim}, state_mean={self.state_mean}, state_std={self.state_std}."
            )


class ClassifierJudge(TrainedJudge):
    """A trained or fresh classifier; satisfies :class:`~hma_gym.judges.protocol.FrameCoder` and, with a ``state_dim``,
    :class:`~hma_gym.judges.protocol.ProprioceptiveJudge`."""

    state_mean: Tensor
    state_std: Tensor

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
        self.sense = _sense(config) if config.state_dim else None
        for name in ("state_mean", "state_std"):
            self.register_buffer(name, torch.tensor(getattr(config, name), dtype=torch.float32), persistent=False)

    @property
    def state_dim(self) -> int:
        """P, dims of agent_pos that it is told; 0 for frames alone."""
        return self.config.state_dim

    @property
    def code_size(self) -> int:
        """D + S, numbers of a frame's code: those of its picture, then those of its agent_pos."""
        return self.config.width + _told_size(self.config)

    def forward(self, frames_BKCHW: Tensor, told_BKS: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The uncalibrated logit (B,) and the standardised position (B, 3).

        Args:
            frames_BKCHW: float, in [-1, 1].
            told_BKS: what :meth:`told` says of their agent_pos; None, or zeros, where it is hidden.
        """
        batch, window = frames_BKCHW.shape[:2]
        codes_BKD = self._codes(frames_BKCHW.flatten(0, 1)).reshape(batch, window, -1)
        if told_BKS is None:
            told_BKS = self.told(None, codes_BKD.shape[:2])
        return self.read_codes(codes_BKD, told_BKS)

    def told(self, agent_pos: Tensor | None, leading: torch.Size) -> Tensor:
        """agent_pos (..., P), own units, as codes say it: (..., S), standardised, and whether it is known.

        Args:
            agent_pos: None where it is not known: zeros.
            leading: the dims (...).
        """
        if agent_pos is None or not self.state_dim:
            return self.state_mean.new_zeros(*leading, _told_size(self.config))
        standard = ((agent_pos.to(self.state_mean) - self.state_mean) / self.state_std).clamp(-REACH, REACH)
        return torch.cat((standard, torch.ones_like(standard[..., :1])), dim=-1)

    def _codes(self, frames_BCHW: Tensor) -> Tensor:
        """Each picture alone: (B, D)."""
        codes_BD: Tensor = F.gelu(self.project(self.encoder(frames_BCHW).flatten(1)))
        return codes_BD

    def read_codes(self, codes_BKD: Tensor, told_BKS: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, from the codes of the pictures, (B, K, D)."""
        mixed_BD = F.gelu(self.mix(codes_BKD.transpose(1, 2)).squeeze(-1))
        seen_BE = torch.cat([mixed_BD, codes_BKD[:, -1]], dim=-1)
        hidden_BD = self.hidden(seen_BE)
        if self.sense is not None:
            known_BK1 = told_BKS[..., -1:]
            felt_BK = torch.cat((waves(told_BKS[..., :-1], OCTAVES) * known_BK1, known_BK1), dim=-1)
            hidden_BD = hidden_BD + self.sense(torch.cat((seen_BE, felt_BK.flatten(1)), dim=-1))
        hidden_BD = F.gelu(hidden_BD)
        return self.logit_head(hidden_BD).squeeze(-1), self.position_head(hidden_BD)

    def _scaled(self, frames: Tensor) -> Tensor:
        """(..., H, W, 3) uint8 to (..., 3, H, W) in [-1, 1]."""
        if tuple(frames.shape[-3:]) != (*self.config.image_size, 3):
            raise InvalidImage(
                f"judge {self.name!r} needs frames of {self.config.image_size} pixels in 3 channels, got "
                f"{tuple(frames.shape[-3:])}; resize them first."
            )
        return frames.movedim(-1, -3).to(self.position_mean) * (2 / 255) - 1

    def _read(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None) -> tuple[Tensor, Tensor]:
        check_window(self, frames_BKHWC)
        check_agent_pos(self, agent_pos_BKP, frames_BKHWC)
        logit, position = self(self._scaled(frames_BKHWC), self.told(agent_pos_BKP, frames_BKHWC.shape[:2]))
        return logit, position

    @torch.inference_mode()
    def probability(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None = None) -> Tensor:
        """Calibrated probability of success in the current (last) frame: (B,) float32.

        Args:
            frames_BKHWC: uint8.
            agent_pos_BKP: of the same frames, own units; None where it is not known.
        """
        return self._probability(self._read(frames_BKHWC, agent_pos_BKP)[0])

    @torch.inference_mode()
    def position(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None = None) -> Tensor:
        """Where the object is in the current (last) frame, metres in the world frame: (B, 3) float32."""
        return self._metres(self._read(frames_BKHWC, agent_pos_BKP)[1])

    @torch.inference_mode()
    def code(self, frames_BHWC: Tensor, agent_pos_BP: Tensor | None = None) -> Tensor:
        """Frames (B, H, W, 3) uint8, each alone, and their agent_pos to codes (B, D + S) float32."""
        check_agent_pos(self, agent_pos_BP, frames_BHWC)
        told_BS = self.told(agent_pos_BP, frames_BHWC.shape[:1])
        return torch.cat((self._codes(self._scaled(frames_BHWC)).float(), told_BS), dim=-1)

    @torch.inference_mode()
    def probability_of_codes(self, codes_BKD: Tensor) -> Tensor:
        """As :meth:`probability`, from the codes (D + S numbers each) of the window's frames, oldest first."""
        seen_BKD, told_BKS = codes_BKD.split((self.config.width, _told_size(self.config)), dim=-1)
        return self._probability(self.read_codes(seen_BKD, told_BKS)[0])


def _told_size(config: ClassifierConfig) -> int:
    """S."""
    return config.state_dim + 1 if config.state_dim else 0


def _sense(config: ClassifierConfig) -> nn.Sequential:
    """What agent_pos, with the picture, adds to the hidden layer. It begins as zero: frames alone decide."""
    felt = config.window * (config.state_dim * (1 + 2 * OCTAVES) + 1)
    last = nn.Linear(config.width, config.width)
    silence(last)
    return nn.Sequential(
        nn.Linear(2 * config.width + felt, config.width),
        nn.GELU(),
        nn.Linear(config.width, config.width),
        nn.GELU(),
        last,
    )


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
