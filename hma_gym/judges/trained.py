"""What trained judges share: a configuration that is stored beside the weights, calibration, and files.

Probabilities are ``sigmoid(logit / temperature)``: temperature and threshold come from held-out episodes. Weights are
stored in half precision and computed in single.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hma_gym.errors import CheckpointError, InvalidArgument, StorageError

ConfigT = TypeVar("ConfigT", bound="TrainedConfig")
JudgeT = TypeVar("JudgeT", bound="TrainedJudge")


@dataclass(frozen=True)
class TrainedConfig:
    """Base of the configurations of trained judges.

    Attributes:
        name: for reports.
        window: K, last frames seen.
        position_mean, position_std: statistics of the object's position (m), the regression's units.
        temperature: divides the logit; above 0.
        threshold: the verdict is ``probability >= threshold``.
    """

    name: str = "judge"
    window: int = 4
    position_mean: tuple[float, float, float] = field(default=(0.0, 0.0, 0.83), kw_only=True)
    position_std: tuple[float, float, float] = field(default=(0.1, 0.1, 0.05), kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    threshold: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InvalidArgument(f"a judge's window must be at least 1, got {self.window}.")
        if not self.temperature > 0 or not 0 < self.threshold < 1 or min(self.position_std) <= 0:
            raise InvalidArgument(
                "a trained judge needs temperature > 0, 0 < threshold < 1 and position_std > 0, got "
                f"temperature={self.temperature}, threshold={self.threshold}, position_std={self.position_std}."
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, read back by :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[ConfigT], fields: Mapping[str, Any]) -> ConfigT:
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


class TrainedJudge(nn.Module):
    """A network whose outputs are the logit of success and the object's position, with its calibration.

    Args:
        config: of the judge's own kind; a subclass is built from it alone.
    """

    position_mean: Tensor
    position_std: Tensor

    def __init__(self, config: TrainedConfig) -> None:
        super().__init__()
        self.calibration = config
        self.register_buffer("position_mean", torch.tensor(config.position_mean), persistent=False)
        self.register_buffer("position_std", torch.tensor(config.position_std), persistent=False)

    @property
    def name(self) -> str:
        """For reports."""
        return self.calibration.name

    @property
    def window(self) -> int:
        """K, last frames seen."""
        return self.calibration.window

    @property
    def threshold(self) -> float:
        """The verdict is ``probability >= threshold``."""
        return self.calibration.threshold

    def _probability(self, logit_B: Tensor) -> Tensor:
        return torch.sigmoid(logit_B.float() / self.calibration.temperature)

    def _metres(self, position_B3: Tensor) -> Tensor:
        return (position_B3 * self.position_std + self.position_mean).float()

    def calibrated(self: JudgeT, temperature: float, threshold: float) -> JudgeT:
        """The same weights (shared) with another temperature and threshold."""
        config = dataclasses.replace(self.calibration, temperature=temperature, threshold=threshold)
        judge = type(self)(config)
        judge.load_state_dict(self.state_dict(), assign=True)
        return judge.to(self.position_mean.device).eval()

    def tensors(self) -> dict[str, Tensor]:
        """Weights for storage: half precision, contiguous, on the CPU. :func:`fill` reads them."""
        return {key: value.detach().half().cpu().contiguous() for key, value in self.state_dict().items()}


def fill(judge: JudgeT, tensors: Mapping[str, Tensor]) -> JudgeT:
    """Give a fresh judge its stored weights, for inference. Raises :class:`CheckpointError` unless they fit."""
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


def save_trained(judge: TrainedJudge, folder: str | Path, stem: str) -> Path:
    """Write ``<stem>.safetensors`` and ``<stem>.json`` into a folder (made if needed), and return it.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    config = judge.calibration
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(judge.tensors(), folder / f"{stem}.safetensors")
        (folder / f"{stem}.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write a judge to {str(folder)!r}: {error}; choose another folder.") from error
    return folder


def read_trained(folder: str | Path, stem: str, command: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`save_trained` wrote: the configuration's fields and the tensors.

    Raises:
        CheckpointError: a file is missing or damaged; ``command`` is what writes such a folder.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / f"{stem}.json").read_text())
        return config, load_file(folder / f"{stem}.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"cannot read a judge from {str(folder)!r}: {error}; give a folder that `{command}` wrote."
        ) from error
