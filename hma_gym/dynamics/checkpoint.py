"""A checkpoint on disk: one folder that holds all that an environment needs.

    config.json             schema version, domains, configurations, provenance, sha256 of every other file
    tokenizer.safetensors   dynamics.safetensors   starts.safetensors
    judge.safetensors   feature_judge.safetensors   uncertainty.safetensors (each of them optional)
    README.md               the model card

Loaded by name (shipped with the package), by path, or by hub id; strict: anything missing, extra, changed or newer is
one :class:`CheckpointError`. Weights may be stored in half precision; they are computed with in float32.

Shape legend: N starts, H W frame, P agent_pos dims, S simulator state dims.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hma_gym.domains import Domain
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.dynamics.uncertainty import Uncertainty, UncertaintyConfig
from hma_gym.errors import CheckpointError, HMAError, StorageError
from hma_gym.extras import require
from hma_gym.judges.classifier import ClassifierConfig, ClassifierJudge
from hma_gym.judges.feature import FeatureConfig, FeatureJudge
from hma_gym.nn.parameters import load_fitting
from hma_gym.tokenizers import build_tokenizer
from hma_gym.tokenizers.protocol import Tokenizer
from hma_gym.version import __version__

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"


@dataclass(frozen=True)
class StartBank:
    """Real first frames, each with the simulator state it came from, so that evaluation can be paired.

    Attributes:
        frames_NHWC: uint8.
        agent_pos_NP: float32, raw units; P = 0 where the domain has no state.
        states_NS: float64, the flattened MuJoCo state (time, qpos, qvel); S = 0 where unknown.
        seeds_N: int64, the seed that ``reset`` of the ground truth was given; -1 where unknown.
        domains_N: int64, index of the domain in the checkpoint; -1 (default) serves any. Where domains differ in P or
            S, the columns that a start's domain does not have are zero (agent_pos) and NaN (states).
    """

    frames_NHWC: NDArray[np.uint8]
    agent_pos_NP: NDArray[np.float32]
    states_NS: NDArray[np.float64]
    seeds_N: NDArray[np.int64]
    domains_N: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.domains_N):
            object.__setattr__(self, "domains_N", np.full(len(self.seeds_N), -1))
        lengths = {f.name: len(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if len(set(lengths.values())) != 1 or not len(self.frames_NHWC):
            raise CheckpointError(f"a start bank needs one or more starts and equal lengths, got {lengths}.")

    def __len__(self) -> int:
        return len(self.seeds_N)

    def of_domain(self, index: int) -> StartBank:
        """The starts that serve one domain. Raises :class:`CheckpointError` where there are none."""
        rows = np.flatnonzero((self.domains_N == index) | (self.domains_N == -1))
        if not len(rows):
            raise CheckpointError(
                f"the start bank has no start of domain {index}, only of {sorted(set(self.domains_N.tolist()))}; "
                "save the checkpoint again with starts of every domain."
            )
        states = self.states_NS[rows]
        return StartBank(
            frames_NHWC=self.frames_NHWC[rows],
            agent_pos_NP=self.agent_pos_NP[rows],
            states_NS=states[:, ~np.isnan(states).all(axis=0)],
            seeds_N=self.seeds_N[rows],
            domains_N=self.domains_N[rows],
        )


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        name: for reports.
        task: key of the task in :data:`hma_gym.envs.tasks.TASKS`, "" for a user's own robot.
        tokenizer, dynamics: in evaluation mode on one device.
        judge: the success classifier, or None.
        feature_judge: the judge that reads tokens, or None.
        uncertainty: the calibrated score of how sure a rollout may be, or None.
        starts: real first frames.
        provenance: how it was trained, as JSON values.
        digest: sha256 of ``config.json``, which names the hashes of all files; "" before it is saved.
    """

    name: str
    task: str
    tokenizer: Tokenizer
    dynamics: Dynamics
    judge: ClassifierJudge | None
    starts: StartBank
    provenance: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    feature_judge: FeatureJudge | None = None
    uncertainty: Uncertainty | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.kind != self.dynamics.head.kind:
            raise CheckpointError(
                f"checkpoint {self.name!r}: the tokenizer makes {self.tokenizer.kind!r} tokens and the dynamics model "
                f"needs {self.dynamics.head.kind!r} ones; pair a model with the tokenizer that it was trained on."
            )

    @property
    def domain(self) -> Domain:
        """The first domain; the only one in most checkpoints."""
        return self.dynamics.domains[0]

    def options(self) -> dict[str, ClassifierJudge | FeatureJudge | Uncertainty | None]:
        """The parts that a checkpoint may do without, by the names of their files."""
        return {"judge": self.judge, "feature_judge": self.feature_judge, "uncertainty": self.uncertainty}

    def to(self, device: torch.device | str) -> Checkpoint:
        """Move the weights, in place, and return self.

        On a CPU those of convolutions have their channels last in memory, as its kernels read them.
        """
        layout = torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format
        for module in (self.tokenizer, self.dynamics, *self.options().values()):
            if isinstance(module, nn.Module):
                module.to(device, memory_format=layout)  # type: ignore[call-overload]
        return self


def shipped_checkpoints() -> list[str]:
    """Names of the checkpoints inside the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def checkpoint_folder(source: str | Path) -> Path:
    """Where a checkpoint lies: an existing folder, a shipped name, or a hub id ``org/name`` (downloaded).

    Raises:
        CheckpointError: none of these.
        MissingExtra: a hub id without ``huggingface_hub``.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if str(source) in shipped_checkpoints():
        return SHIPPED / str(source)
    parts = str(source).split("/")
    if len(parts) == 2 and all(parts) and not path.is_absolute() and parts[0] not in (".", ".."):
        hub = require("huggingface_hub", extra="hub", purpose=f"checkpoint {str(source)!r} from the hub")
        try:
            return Path(hub.snapshot_download(str(source)))
        except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
            raise CheckpointError(
                f"checkpoint {str(source)!r} is no folder here and could not be fetched from the hub: {error}"
            ) from error
    raise CheckpointError(
        f"checkpoint must be a shipped name ({', '.join(shipped_checkpoints()) or 'none here'}), a folder, or a hub id "
        f"'org/name', got {str(source)!r}."
    )


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path, *, half: bool = True, card: str = "") -> Path:
    """Write a checkpoint folder; a complete new folder takes the place of an old one, or nothing changes.

    Args:
        half: store the weights of tokenizer and dynamics as float16 (statistics and caches are not weights).
        card: text of README.md.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise StorageError(f"checkpoint folder {str(folder)!r} must be writable: {error}; choose another.") from error
    try:
        save_file(_weights(checkpoint.tokenizer, half), work / "tokenizer.safetensors")
        save_file(_weights(checkpoint.dynamics, half), work / "dynamics.safetensors")
        for name, part in checkpoint.options().items():
            if part is not None:  # directions scaled by 1 / deviation do not fit into half precision
                save_file(_weights(part, half and name != "uncertainty"), work / f"{name}.safetensors")
        starts = {f.name: torch.from_numpy(getattr(checkpoint.starts, f.name)) for f in dataclasses.fields(StartBank)}
        save_file({name: tensor.contiguous() for name, tensor in starts.items()}, work / "starts.safetensors")
        config = {
            "schema_version": SCHEMA_VERSION,
            "hma_gym_version": __version__,
            "name": checkpoint.name,
            "task": checkpoint.task,
            "domains": [domain.to_dict() for domain in checkpoint.dynamics.domains],
            "tokenizer": checkpoint.tokenizer.config.to_dict(),
            "dynamics": checkpoint.dynamics.config.to_dict(),
            **{name: None if part is None else part.config.to_dict() for name, part in checkpoint.options().items()},
            "files": {path.name: _sha256(path) for path in sorted(work.glob("*.safetensors"))},
            "provenance": dict(checkpoint.provenance),
        }
        (work / "README.md").write_text(card or f"# {checkpoint.name}\n")
        (work / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for path in work.iterdir():  # temporary files begin private; a checkpoint is for sharing
            path.chmod(0o644)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(work, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise StorageError(
            f"checkpoint {str(folder)!r} could not be written: {error}; free space or choose another."
        ) from error
    os.chmod(folder, 0o755)
    return folder


def load_checkpoint(source: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a checkpoint by shipped name, folder or hub id.

    Raises:
        CheckpointError: missing, truncated, tampered with, newer than this version, or inconsistent in itself.
    """
    folder = checkpoint_folder(source)
    config, digest = _read_config(folder)
    missing = {"domains", "tokenizer", "dynamics", "judge", "files", "name", "task", "provenance"} - set(config)
    if missing:
        raise CheckpointError(f"{folder / 'config.json'} lacks the keys {sorted(missing)}; fetch the checkpoint again.")
    # Older checkpoints do not name all of them.
    options = [name for name in ("judge", "feature_judge", "uncertainty") if config.get(name)]
    parts = ("tokenizer", "dynamics", "starts", *options)
    needed = {f"{part}.safetensors" for part in parts}
    if not isinstance(config["files"], dict) or set(config["files"]) != needed:
        raise CheckpointError(
            f"{folder / 'config.json'} must give the sha256 of exactly {sorted(needed)}, got {config['files']!r}; "
            "fetch the checkpoint again."
        )
    for name, digest_wanted in config["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {str(folder)!r} lacks {name}; fetch it again.")
        if _sha256(path) != digest_wanted:
            raise CheckpointError(
                f"{path} is not the file that config.json describes (its sha256 differs): it was truncated or changed; "
                "fetch the checkpoint again."
            )
    try:
        domains = [Domain.from_dict(fields) for fields in config["domains"]]
        tokenizer = build_tokenizer(config["tokenizer"])
        dynamics = Dynamics(DynamicsConfig.from_dict(config["dynamics"]), domains)
        judge = ClassifierJudge(ClassifierConfig.from_dict(config["judge"])) if "judge" in options else None
        feature_judge = uncertainty = None
        if "feature_judge" in options:
            feature_judge = FeatureJudge(FeatureConfig.from_dict(config["feature_judge"]))
        if "uncertainty" in options:
            uncertainty = Uncertainty(UncertaintyConfig.from_dict(config["uncertainty"]))
    except CheckpointError:
        raise
    except (HMAError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'} describes no model of this version: {error}") from error
    modules: list[tuple[str, nn.Module]] = [("tokenizer", tokenizer), ("dynamics", dynamics)]
    found = {"judge": judge, "feature_judge": feature_judge, "uncertainty": uncertainty}
    modules += [(name, module) for name, module in found.items() if module is not None]
    for name, module in modules:
        _load_weights(module, _read_tensors(folder / f"{name}.safetensors"), folder / f"{name}.safetensors")
        module.eval().requires_grad_(False)
    starts = _read_tensors(folder / "starts.safetensors")
    names = {f.name for f in dataclasses.fields(StartBank)}
    if set(starts) | {"domains_N"} != names:
        raise CheckpointError(f"{folder / 'starts.safetensors'} must hold {sorted(names)}, got {sorted(starts)}.")
    return Checkpoint(
        name=str(config["name"]),
        task=str(config["task"]),
        tokenizer=tokenizer,
        dynamics=dynamics,
        judge=judge,
        feature_judge=feature_judge,
        uncertainty=uncertainty,
        starts=StartBank(**{name: tensor.numpy() for name, tensor in starts.items()}),
        provenance=config["provenance"],
        digest=digest,
    ).to(device)


def start_bank(
    frames: Sequence[NDArray[np.uint8]],
    agent_pos: Sequence[NDArray[np.float32]],
    states: Sequence[NDArray[np.float64]] | None = None,
    seeds: Sequence[int] | None = None,
    domains: Sequence[int] | None = None,
) -> StartBank:
    """A start bank from lists of first frames; unknown states and seeds become empty and -1."""
    count = len(frames)
    return StartBank(
        frames_NHWC=np.stack(frames),
        agent_pos_NP=_stack_padded(agent_pos, 0.0).astype(np.float32),
        states_NS=_stack_padded(states, np.nan) if states is not None else np.zeros((count, 0)),
        seeds_N=np.array(seeds if seeds is not None else [-1] * count, dtype=np.int64),
        domains_N=np.array(domains if domains is not None else [-1] * count, dtype=np.int64),
    )


def _stack_padded(rows: Sequence[NDArray[Any]], fill: float) -> NDArray[np.float64]:
    result = np.full((len(rows), max(map(len, rows))), fill)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = values
    return result


def _weights(module: nn.Module, half: bool) -> dict[str, Tensor]:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    return {name: _halved(tensor) for name, tensor in tensors.items()} if half else tensors


def _halved(tensor: Tensor) -> Tensor:
    """A weight as float16; what is small, or no weight, as it is."""
    return tensor.half() if tensor.is_floating_point() and tensor.numel() > 1024 else tensor


def fits_half(checkpoint: Checkpoint) -> bool:
    """Whether half precision would store the weights of tokenizer and dynamics as they are, as it does where they come
    from such a file."""
    tensors = (*checkpoint.tokenizer.state_dict().values(), *checkpoint.dynamics.state_dict().values())
    return all(torch.equal(tensor, _halved(tensor).to(tensor.dtype)) for tensor in tensors)


def _load_weights(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    wrong = load_fitting(module, tensors)
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors do not fit the model that config.json describes, first {wrong[0]!r}; "
            "config and weights come from different checkpoints."
        )


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / "config.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint folder {str(folder)!r} must hold a readable config.json: {error}."
        ) from error
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}): truncated or changed; fetch the checkpoint again."
        ) from error
    version = config.get("schema_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path} is no hma_gym checkpoint: it has no schema_version.")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}; hma_gym {__version__} reads up to {SCHEMA_VERSION}. "
            "Upgrade it: pip install --upgrade hma_gym."
        )
    return config, hashlib.sha256(text).hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); fetch the checkpoint again.") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
