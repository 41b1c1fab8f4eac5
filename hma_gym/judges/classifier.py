"""The classifier judge: a small temporal convolutional network over the last K frames.

One output is the logit of success in the current frame, one the position of the task's object, so that where a
generated video puts the cube can be measured in metres.

- Each frame is encoded alone (about 10 MFLOP at 64 x 64): patches of 4 x 4 pixels first, so that no layer runs at a
  resolution at which a CPU is slow. The K codes are mixed by a convolution over time as long as the window.
- Probabilities are ``sigmoid(logit / temperature)``: temperature and threshold come from held-out episodes.
- Weights are stored in half precision and computed in single.

Shape legend: B batch, K window, H W image, D code width, X position dims (3, metres).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hma_gym.errors import CheckpointError, InvalidArgument, InvalidImage, StorageError
from hma_gym.judges.protocol import check_window


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape and calibration of a classifier judge.

    Attributes:
        name: for reports.
        window: K, last frames seen.
        image_size: (height, width) in pixels, multiples of 8.
        channels: widths of the three convolutions (at 1/4, 1/8 and 1/8 of the resolution).
        width: D, size of a frame's code.
        position_mean, position_std: statistics of the object's position (m), the regression's units.
        temperature: divides the logit; above 0.
        threshold: the verdict is ``probability >= threshold``.
    """

    name: str = "classifier"
    window: int = 4
    image_size: tuple[int, int] = (64, 64)
    channels: tuple[int, int, int] = (48, 64, 64)
    width: int = 128
    position_mean: tuple[float, float, float] = (0.0, 0.0, 0.83)
    position_std: tuple[float, float, float] = (0.1, 0.1, 0.05)
    temperature: float = 1.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.window < 1 or self.width < 1 or min(self.channels) < 1:
            raise InvalidArgument(
                f"a classifier judge needs window, width and channels of at least 1, got window={self.window}, "
                f"width={self.width}, channels={self.channels}."
            )
        if any(side < 8 or side % 8 for side in self.image_size):
            raise InvalidArgument(f"image_size must be multiples of 8 pixels, got {self.image_size}.")
        if not self.temperature > 0 or not 0 < self.threshold < 1 or min(self.position_std) <= 0:
            raise InvalidArgument(
                "a classifier judge needs temperature > 0, 0 < threshold < 1 and position_std > 0, got "
                f"temperature={self.temperature}, threshold={self.threshold}, position_std={self.position_std}."
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, read back by :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ClassifierConfig:
        """The inverse of :meth:`to_dict`; unknown keys raise :class:`CheckpointError`."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise CheckpointError(
                f"judge: unknown config keys {unknown}; this version of hma_gym knows {sorted(known)}. "
                "A newer version may have written it: upgrade hma_gym."
            )
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**values)


class ClassifierJudge(nn.Module):
    """A trained or fresh classifier; satisfies :class:`~hma_gym.judges.protocol.Judge`."""

    position_mean: Tensor
    position_std: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
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
        self.register_buffer("position_mean", torch.tensor(config.position_mean), persistent=False)
        self.register_buffer("position_std", torch.tensor(config.position_std), persistent=False)

    @property
    def name(self) -> str:
        """For reports."""
        return self.config.name

    @property
    def window(self) -> int:
        """K, last frames seen."""
        return self.config.window

    @property
    def threshold(self) -> float:
        """The verdict is ``probability >= threshold``."""
        return self.config.threshold

    def forward(self, frames_BKCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Float frames in [-1, 1] to the uncalibrated logit (B,) and the standardised position (B, 3)."""
        batch, window = frames_BKCHW.shape[:2]
        maps = self.encoder(frames_BKCHW.flatten(0, 1))
        codes_BKD = F.gelu(self.project(maps.flatten(1))).reshape(batch, window, -1)
        mixed_BD = F.gelu(self.mix(codes_BKD.transpose(1, 2)).squeeze(-1))
        hidden_BD = F.gelu(self.hidden(torch.cat([mixed_BD, codes_BKD[:, -1]], dim=-1)))
        return self.logit_head(hidden_BD).squeeze(-1), self.position_head(hidden_BD)

    def _read(self, frames_BKHWC: Tensor) -> tuple[Tensor, Tensor]:
        check_window(self, frames_BKHWC)
        if tuple(frames_BKHWC.shape[2:]) != (*self.config.image_size, 3):
            raise InvalidImage(
                f"judge {self.name!r} needs frames of {self.config.image_size} pixels in 3 channels, got "
                f"{tuple(frames_BKHWC.shape[2:])}; resize them first."
            )
        scaled = frames_BKHWC.permute(0, 1, 4, 2, 3).to(self.position_mean) * (2 / 255) - 1
        logit, position = self(scaled)
        return logit, position

    @torch.inference_mode()
    def probability(self, frames_BKHWC: Tensor) -> Tensor:
        """Calibrated probability of success in the current (last) frame: (B,) float32."""
        logit, _ = self._read(frames_BKHWC)
        return torch.sigmoid(logit.float() / self.config.temperature)

    @torch.inference_mode()
    def position(self, frames_BKHWC: Tensor) -> Tensor:
        """Where the object is in the current (last) frame, metres in the world frame: (B, 3) float32."""
        _, position = self._read(frames_BKHWC)
        return (position * self.position_std + self.position_mean).float()

    def calibrated(self, temperature: float, threshold: float) -> ClassifierJudge:
        """The same weights (shared) with another temperature and threshold."""
        judge = ClassifierJudge(dataclasses.replace(self.config, temperature=temperature, threshold=threshold))
        judge.load_state_dict(self.state_dict(), assign=True)
        return judge.to(self.position_mean.device).eval()

    def tensors(self) -> dict[str, Tensor]:
        """Weights for storage: half precision, contiguous, on the CPU. :func:`build_classifier` reads them."""
        return {key: value.detach().half().cpu().contiguous() for key, value in self.state_dict().items()}


def build_classifier(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ClassifierJudge:
    """A judge from :meth:`ClassifierConfig.to_dict` and :meth:`ClassifierJudge.tensors`, on the CPU, for inference.

    Raises:
        CheckpointError: unknown or invalid config, or tensors that do not fit it.
    """
    try:
        judge = ClassifierJudge(ClassifierConfig.from_dict(config))
    except InvalidArgument as error:
        raise CheckpointError(f"judge: its stored config is invalid: {error}") from error
    expected = judge.state_dict()
    for key in sorted({*expected, *tensors}):
        if key not in expected or key not in tensors or expected[key].shape != tensors[key].shape:
            want = tuple(expected[key].shape) if key in expected else "nothing"
            got = tuple(tensors[key].shape) if key in tensors else "nothing"
            raise CheckpointError(
                f"judge: tensor {key!r} must have shape {want}, got {got}; the weights belong to another config."
            )
    judge.load_state_dict({key: value.float() for key, value in tensors.items()})
    return judge.eval().requires_grad_(False)


def save_judge(judge: ClassifierJudge, folder: str | Path) -> Path:
    """Write ``judge.safetensors`` and ``judge.json`` into a folder (made if needed), and return it.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(judge.tensors(), folder / "judge.safetensors")
        (folder / "judge.json").write_text(json.dumps(judge.config.to_dict(), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write a judge to {str(folder)!r}: {error}; choose another folder.") from error
    return folder


def load_judge(folder: str | Path) -> ClassifierJudge:
    """Read what :func:`save_judge` wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or they do not fit together.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "judge.json").read_text())
        tensors = load_file(folder / "judge.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"cannot read a judge from {str(folder)!r}: {error}; give a folder that `hma-gym train judge` wrote."
        ) from error
    return build_classifier(config, tensors)
