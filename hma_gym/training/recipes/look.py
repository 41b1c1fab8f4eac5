"""A stage of its own for how a world draws: ``look``, on tokens and on pixels, with all else left as it is.

    hma-gym train look --checkpoint runs/mine/checkpoint --data mine.hdf5 stills.hdf5 --out runs/look --minutes 15

Training a body (:mod:`hma_gym.training.recipes.body`) teaches ``look`` along with the rest and on tokens alone. Here it
goes on by itself, or begins anew in another size:

- every token of a frame is drawn, and some frames are decoded, for a small error of tokens may be a large one of
  pixels;
- stills (``hma-gym data stills``) show arms and objects apart;
- some stills are drawn of a disturbed pose, for the poses of a rollout are never quite right;
- the tokenizer's decoder may learn with it to decode what is drawn: the encoder stays, and so do the tokens, and
  whatever was trained on them.

The trunk, the judge and the uncertainty of the checkpoint are those that it had, which know the former drawings.

Shape legend: M frames, F frames of all episodes, K some of them, P agent_pos dims, X target dims, S tokens of a frame,
C channels, H W frame.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from hma_gym.data.cache import TokenCache
from hma_gym.data.robomimic_hdf5 import Dataset
from hma_gym.dynamics.body import Body
from hma_gym.dynamics.checkpoint import Checkpoint, checkpoint_folder, fits_half, load_checkpoint, save_checkpoint
from hma_gym.dynamics.coast import ROTATION
from hma_gym.dynamics.model import Dynamics
from hma_gym.errors import DatasetError, InvalidArgument, StorageError, UnknownName
from hma_gym.metrics.video import psnr
from hma_gym.nn.parameters import ParameterGroup
from hma_gym.tokenizers import SoftTokenizer
from hma_gym.tokenizers.files import save_tokenizer
from hma_gym.tokenizers.protocol import Tokenizer
from hma_gym.training import Every, OptimizerConfig, TrainConfig, TrainResult, train
from hma_gym.training.recipes.dynamics import check_files, files_of_domains, tokens_of_domain

#: Held-out frames of a kind that are tried, spread evenly; and how many at once.
TRIED, AT_ONCE = 512, 128

#: Weight of the absolute beside the squared error of a pixel, and up to where (of 1) it is squared too.
ABSOLUTE, ROUNDED = 0.3, 0.01

#: The decoder, which is trained already, learns so much slower than ``look``.
DECODER_RATE = 0.5

#: Options that decide what a step computes, beside those that the loop knows.
DRAWN = (
    "frames", "pixel_frames", "pixel_weight", "still_share", "first_share", "disturbed", "disturbance", "decoder",
    "images",
)  # fmt: skip


@dataclass(frozen=True)
class LookOptions:
    """Options of ``hma-gym train look``; everything else is the recipe's.

    Attributes:
        checkpoint: folder or shipped name of a checkpoint with soft tokens whose body draws (its domain has agent_pos).
        data: robomimic HDF5 files with images (or ``.parts`` folders), of episodes or of stills.
        out: folder of the run; the checkpoint goes to ``<out>/checkpoint``.
        names: names of the files' domains in the checkpoint, one a file; files of the same name belong to one domain.
            By default the checkpoint's domain where it has one, else the files' stems. Other domains stay as they are.
        minutes: length of the training.
        steps: length in steps, in place of minutes (then a resumed run is exact).
        max_minutes: stop this session, saved, before so many minutes are over; call again to go on.
        frames: single frames a step, of each domain. On a GPU 4096.
        pixel_frames: so many of them are also decoded and compared in pixels; 0 to ``frames``. On a GPU 1024.
        pixel_weight: weight of the error of pixels (in [0, 1]) beside that of tokens, 0 or more; 0 for none.
        still_share: share of the frames that are stills, 0 to 1, where the data has both kinds.
        first_share: share of the other frames that are the first of their episodes, 0 to 1.
        disturbed: share of the stills whose agent_pos is disturbed, 0 to 1.
        disturbance: by noise of up to so many standard deviations of agent_pos over the data, 0 or more; the hand's
            rotation stays one.
        width, layers: size of ``look``, 1 or more, 0 for that of the checkpoint. In another size it begins anew but for
            its anchors and reach, and all domains that are drawn need data.
        decoder: train the tokenizer's decoder too, on true frames: half on what is drawn, half on their own tokens. The
            tokenizer also goes to ``<out>/tokenizer``. Without it pixels are compared with the decoded true tokens.
        images: with ``decoder``, the images of so many training frames of each domain are kept in memory, spread evenly
            (H * W * 3 bytes each: 1.2 GB for 100,000 of 64 x 64); pixels are compared on these. Tokens of all frames
            are kept in any case (S * C * 2 bytes, 1 KB a frame).
        lr: peak learning rate.
        device: ``cpu`` or ``cuda``.
        seed: of everything random.
    """

    checkpoint: str
    data: tuple[Path, ...]
    out: Path
    names: tuple[str, ...] = ()
    minutes: float = 15.0
    steps: int | None = None
    max_minutes: float | None = None
    frames: int = 256
    pixel_frames: int = 64
    pixel_weight: float = 30.0
    still_share: float = 0.5
    first_share: float = 0.1
    disturbed: float = 0.3
    disturbance: float = 0.8
    width: int = 0
    layers: int = 0
    decoder: bool = False
    images: int = 100_000
    lr: float = 2e-3
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check_files(self.data, self.names)
        for name, low in (("frames", 1), ("pixel_frames", 0), ("width", 0), ("layers", 0), ("images", 1)):
            if getattr(self, name) < low:
                raise InvalidArgument(f"{name} must be {low} or more, got {getattr(self, name)}.")
        for name in ("still_share", "first_share", "disturbed"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgument(f"{name} must be a share in [0, 1], got {getattr(self, name)}.")
        for name in ("pixel_weight", "disturbance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidArgument(f"{name} must be 0 or more, got {getattr(self, name)}; 0 is none.")
        if self.pixel_frames > self.frames:
            raise InvalidArgument(
                f"pixel_frames must be at most frames, got {self.pixel_frames} of {self.frames}: raise frames."
            )
        if self.decoder and not self.compares_pixels:
            raise InvalidArgument(
                "decoder learns from pixels, so pixel_frames and pixel_weight must be positive, got "
                f"pixel_frames={self.pixel_frames} and pixel_weight={self.pixel_weight}."
            )

    @property
    def compares_pixels(self) -> bool:
        return self.pixel_frames > 0 and self.pixel_weight > 0


# ---------------------------------------------------------------------- data


def evenly(rows_K: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most so many of the rows, spread evenly over them."""
    return rows_K[np.linspace(0, len(rows_K) - 1, min(count, len(rows_K))).astype(np.int64)]


@dataclass(frozen=True)
class Frames:
    """Rows of a token cache to draw from, (K,) each, ascending.

    Attributes:
        moving: of episodes that go on after their first row.
        first: the first ones of those.
        stills: the others.
    """

    moving: NDArray[np.int64]
    first: NDArray[np.int64]
    stills: NDArray[np.int64]

    @classmethod
    def of(cls, cache: TokenCache, split: str) -> Frames:
        """All of a split."""
        lengths = np.diff(cache.starts_N1)
        alone_F, rows = np.repeat(lengths == 1, lengths), cache.frames(split)
        return cls(rows[~alone_F[rows]], cache.starts_N1[cache.moving(split)], rows[alone_F[rows]])

    def __len__(self) -> int:
        return len(self.moving) + len(self.stills)

    def rows(self) -> NDArray[np.int64]:
        return np.union1d(self.moving, self.stills)

    def among(self, rows_K: NDArray[np.int64]) -> Frames:
        """Those of them that are among some rows."""
        return Frames(*(np.intersect1d(own, rows_K) for own in (self.moving, self.first, self.stills)))

    def spread(self, count: int) -> Frames:
        """At most so many of each kind."""
        return Frames(*(evenly(own, count) for own in (self.moving, self.first, self.stills)))

    def draw(
        self, rng: np.random.Generator, count: int, still_share: float, first_share: float
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(count,) rows, and which of them are stills."""
        stills = round(still_share * count) if len(self.moving) and len(self.stills) else count * bool(len(self.stills))
        first = round(first_share * (count - stills)) if len(self.first) else 0
        kinds = ((self.first, first), (self.moving, count - stills - first), (self.stills, stills))
        rows = np.concatenate([rng.choice(own, size=size) for own, size in kinds if size])
        return rows, np.arange(count) >= count - stills


@dataclass(frozen=True)
class Pictures:
    """Images (K, H, W, 3) uint8 of some rows of a token cache, ascending."""

    rows_K: NDArray[np.int64]
    images_KHWC: NDArray[np.uint8]

    def of(self, rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self.images_KHWC[np.searchsorted(self.rows_K, rows)])


def read_pictures(files: Sequence[Dataset], rows_K: NDArray[np.int64]) -> Pictures:
    """Read the images of some rows of the files' joined token cache."""
    episodes = [(file, n, demo.length) for file in files for n, demo in enumerate(file.demos)]
    images: list[NDArray[np.uint8]] = []
    begin = 0
    for file, n, length in tqdm(episodes, desc="reading images", unit="episode"):
        low, high = np.searchsorted(rows_K, (begin, begin + length))
        if high > low:
            images.append(file[n].images_THWC[rows_K[low:high] - begin])
        begin += length
    return Pictures(rows_K, np.concatenate(images))


@dataclass(frozen=True)
class Source:
    """What one domain is learned from.

    Attributes:
        cache: of its files, joined.
        train, valid: the frames that are learned from, and tried.
        pictured: those of ``train`` whose pixels are compared.
        pictures: of ``pictured`` and ``valid``; None where pixels are compared with decoded tokens.
        target_dim: X, the dims of the object's pose that the body is told.
        std_P: standard deviation of agent_pos.
        turned: whether agent_pos is that of a hand, whose rotation is a quaternion.
    """

    cache: TokenCache
    train: Frames
    valid: Frames
    pictured: Frames
    pictures: Pictures | None
    target_dim: int
    std_P: NDArray[np.float32]
    turned: bool

    def poses(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """agent_pos (K, P) and the object's poses (K, X), own units."""
        return self.cache.agent_pos_FP[rows], self.cache.targets_FX[rows][:, : self.target_dim]

    def disturbed(
        self, agent_pos_KP: NDArray[np.float32], level_K: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """agent_pos with noise of so many standard deviations; where the level is 0 it is as it was."""
        noise = level_K[:, None] * rng.standard_normal(agent_pos_KP.shape) * self.std_P
        noisy_KP = agent_pos_KP + noise.astype(np.float32)
        if self.turned:
            noisy_KP[:, ROTATION] /= np.linalg.norm(noisy_KP[:, ROTATION], axis=1, keepdims=True)
        return np.where(level_K[:, None] > 0, noisy_KP, agent_pos_KP)


def make_source(name: str, files: Sequence[Dataset], body: Body, tokenizer: Tokenizer, options: LookOptions) -> Source:
    """The frames of a domain; encoded into ``<out>/<name>.tokens.h5`` where they are not yet.

    Raises:
        DatasetError: a file has no images or cannot be read, the data is not the domain's, or none of it is for
            training.
    """
    domain = body.domain
    blind = [str(file.path) for file in files if file.image_key is None]
    if blind:
        raise DatasetError(
            f"data must have images, which {blind} have not; leave these out, or picture their states with: "
            "hma-gym data stills FILE."
        )
    cache = tokens_of_domain(name, files, tokenizer, options.out).turned_alike(domain.object_turns)
    dims, wanted = cache.agent_pos_FP.shape[1], domain.state_dim
    if dims != wanted or (body.target_dim and not cache.has_object_pose()):
        raise DatasetError(
            f"data of domain {name!r} must have agent_pos of {wanted} dims and an object's pose of {body.target_dim}, "
            f"as the checkpoint has, got {dims} and {cache.targets_FX.shape[1]}; tell with names which domain a file "
            "is of."
        )
    train_frames, valid = Frames.of(cache, "train"), Frames.of(cache, "valid").spread(TRIED)
    if not len(train_frames):
        raise DatasetError(f"data of domain {name!r} has no episode in its 'train' split; record more.")
    pictured, pictures = train_frames, None
    if options.decoder:
        pictured = train_frames.among(evenly(train_frames.rows(), options.images))
        pictures = read_pictures(files, np.union1d(pictured.rows(), valid.rows()))
    seen_KP = cache.agent_pos_FP[train_frames.rows()]
    lengths = np.linalg.norm(seen_KP[:, ROTATION], axis=1)
    return Source(
        cache=cache,
        train=train_frames,
        valid=valid,
        pictured=pictured,
        pictures=pictures,
        target_dim=body.target_dim,
        std_P=np.asarray(domain.state_std, np.float32),
        turned=dims >= ROTATION.stop and bool(np.allclose(lengths, 1.0, atol=1e-2)),
    )


@dataclass(frozen=True)
class LookBatches:
    """Single frames of each domain, those whose pixels are compared first; a pure function of (seed, step)."""

    sources: Mapping[str, Source]
    options: LookOptions

    def batch(self, step: int) -> dict[str, Tensor]:
        """Of each domain, by its name: ``tokens`` (M, S, C) float16, ``agent_pos`` (M, P), ``targets`` (M, X), and with
        a decoder to train ``images`` (pixel_frames, H, W, 3) uint8."""
        options, batch = self.options, {}
        for index, (name, source) in enumerate(self.sources.items()):
            rng = np.random.default_rng((options.seed, step, index))
            compared = options.pixel_frames if options.compares_pixels else 0
            parts = ((source.pictured, compared), (source.train, options.frames - compared))
            drawn = [own.draw(rng, n, options.still_share, options.first_share) for own, n in parts if n]
            rows, still = (np.concatenate(part) for part in zip(*drawn, strict=True))
            level = options.disturbance * rng.random(len(rows))
            level = np.where(still & (rng.random(len(rows)) < options.disturbed), level, 0.0)
            agent_pos, targets = source.poses(rows)
            batch[f"{name}/tokens"] = torch.from_numpy(source.cache.tokens[rows])
            batch[f"{name}/agent_pos"] = torch.from_numpy(source.disturbed(agent_pos, level, rng))
            batch[f"{name}/targets"] = torch.from_numpy(targets)
            if source.pictures is not None:
                batch[f"{name}/images"] = source.pictures.of(rows[:compared])
        return batch


# ---------------------------------------------------------------------- training


class LookTraining(nn.Module):
    """What the loop trains: ``look`` of some bodies, and the tokenizer's decoder if it is told so.

    Args:
        bodies: by the names of their domains; each draws.
        tokenizer: whose tokens they draw.
        options: of the run.
    """

    def __init__(self, bodies: Mapping[str, Body], tokenizer: Tokenizer, options: LookOptions) -> None:
        super().__init__()
        self.bodies = nn.ModuleDict(bodies)
        self.tokenizer = tokenizer
        self.options = options
        self.requires_grad_(False)
        for body in bodies.values():
            assert body.look is not None
            body.look.requires_grad_(True)
        if options.decoder:
            assert isinstance(tokenizer, SoftTokenizer)
            tokenizer.decoder.requires_grad_(True)
            tokenizer.background.requires_grad_(True)

    def named_bodies(self) -> dict[str, Body]:
        return {name: body for name, body in self.bodies.items() if isinstance(body, Body)}

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the domains of the error of tokens and, of the first frames, of pixels; see
        :meth:`LookBatches.batch`."""
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for name, body in self.named_bodies().items():
            prefix = f"{name}/" if len(self.bodies) > 1 else ""
            tokens = batch[f"{name}/tokens"].float()
            drawn, loss = body.drawing_loss(tokens, batch[f"{name}/agent_pos"], batch[f"{name}/targets"])
            metrics[f"{prefix}token_loss"] = loss.detach()
            if self.options.compares_pixels:
                compared = slice(self.options.pixel_frames)
                pixels = self._pixel_loss(drawn[compared], tokens[compared], batch.get(f"{name}/images"))
                metrics[f"{prefix}pixel_loss"] = pixels.detach()
                loss = loss + self.options.pixel_weight * pixels
            losses.append(loss)
        return torch.stack(losses).mean(), metrics

    def _pixel_loss(self, drawn: Tensor, tokens: Tensor, frames: Tensor | None) -> Tensor:
        """Of drawn tokens (M, S, C), beside the true ones; and, told the frames (M, H, W, 3), of both beside these."""
        assert isinstance(self.tokenizer, SoftTokenizer)
        if frames is None:
            with torch.no_grad():
                wanted = self.tokenizer.tokens_to_images(tokens).float()
            return pixel_error(self.tokenizer.tokens_to_images(drawn), wanted)
        wanted = self.tokenizer.to_images(frames)
        return pixel_error(self.tokenizer.tokens_to_images(torch.cat((drawn, tokens))), torch.cat((wanted, wanted)))

    def parameter_groups(self) -> list[ParameterGroup]:
        groups = [
            dataclasses.replace(group, name=f"{name}/{group.name}")
            for name, body in self.named_bodies().items()
            if body.look is not None
            for group in body.look.parameter_groups()
        ]
        decoder = [p for p in self.tokenizer.parameters() if p.requires_grad]
        return [*groups, ParameterGroup("decoder", decoder, lr_multiplier=DECODER_RATE)]


def pixel_error(images: Tensor, wanted: Tensor) -> Tensor:
    """Mean of the squared and, rounded off near 0, some of the absolute error of images in [0, 1]."""
    square = (images.float() - wanted).square()
    return (ABSOLUTE * ((square + ROUNDED**2).sqrt() - ROUNDED) + square).mean()


@dataclass(frozen=True)
class LookValidation:
    """What the drawings of held-out frames and stills lack.

    ``valid_look`` is the mean square error of the drawn tokens over their variance, ``valid_psnr`` (dB) the mean over
    frames of how near decoded drawings come to the decoded true tokens and, with a decoder to train,
    ``valid_true_psnr`` to the true frames; ``valid_decoder_psnr`` is how near the decoded true tokens come to these.
    ``stills_look`` ... are the same of stills. Each is there where there are such frames, and by domain where there are
    several.
    """

    sources: Mapping[str, Source]

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(model, LookTraining)
        scores: dict[str, float] = {}
        for name, body in model.named_bodies().items():
            source = self.sources[name]
            prefix = f"{name}/" if len(self.sources) > 1 else ""
            for kind, rows in (("valid", source.valid.moving), ("stills", source.valid.stills)):
                if len(rows):
                    found = self._scores(body, model.tokenizer, source, rows)
                    scores |= {f"{prefix}{kind}_{key}": value for key, value in found.items()}
        return scores

    def _scores(self, body: Body, tokenizer: Tokenizer, source: Source, rows: NDArray[np.int64]) -> dict[str, float]:
        std_SC = body.get_buffer("token_std")
        sums: dict[str, Tensor] = {}
        for part in np.split(rows, range(AT_ONCE, len(rows), AT_ONCE)):
            agent_pos, targets = (torch.from_numpy(array).to(std_SC.device) for array in source.poses(part))
            tokens = torch.from_numpy(source.cache.tokens[part]).to(std_SC.device).float()
            drawn = body.drawn(agent_pos, targets)
            assert drawn is not None
            shown, decoded = tokenizer.decode(drawn), tokenizer.decode(tokens)
            found = {"look": (drawn - tokens).square().mean((1, 2)) / std_SC.square().mean()}
            found["psnr"] = psnr(decoded, shown)
            if source.pictures is not None:
                frames = source.pictures.of(part).to(std_SC.device)
                found |= {"true_psnr": psnr(frames, shown), "decoder_psnr": psnr(frames, decoded)}
            sums = {key: sums.get(key, torch.zeros(())) + value.sum().cpu() for key, value in found.items()}
        return {key: float(value) / len(rows) for key, value in sums.items()}


def drawing_bodies(checkpoint: Checkpoint) -> dict[str, Body]:
    """The bodies of a checkpoint that draw, by the names of their domains."""
    dynamics = checkpoint.dynamics
    bodies = {domain.name: dynamics.adapter(index).body for index, domain in enumerate(dynamics.domains)}
    return {name: body for name, body in bodies.items() if body.look is not None}


def resized(dynamics: Dynamics, width: int, layers: int) -> Dynamics:
    """The same model with ``look`` of this size, untrained but for what it knows of where things are."""
    body = dataclasses.replace(dynamics.config.body, look_width=width, look_layers=layers)
    other = Dynamics(dataclasses.replace(dynamics.config, body=body), dynamics.domains)
    own, had = other.state_dict(), dynamics.state_dict()
    kept = {name for name in had if ".body.look." not in name}
    for index, domain in enumerate(dynamics.domains):
        look = dynamics.adapter(index).body.look
        if look is not None:
            kept |= {f"adapters.{domain.name}.body.look.{name}" for name in look.geometry()}
    other.load_state_dict({**own, **{name: had[name] for name in kept}})
    return other.eval().requires_grad_(False)


def _read_checkpoint(options: LookOptions) -> Checkpoint:
    """The checkpoint, which this stage can go on with, see :func:`train_look`."""
    folder = checkpoint_folder(options.checkpoint)
    if folder.resolve() == (options.out / "checkpoint").resolve():
        raise InvalidArgument(
            f"out must be another folder than that of the run that made checkpoint {options.checkpoint!r}, got "
            f"{str(options.out)!r}; name a new one."
        )
    checkpoint = load_checkpoint(folder)
    if not drawing_bodies(checkpoint):
        raise InvalidArgument(
            "checkpoint must have soft tokens and a domain with agent_pos, whose body draws, got "
            f"{options.checkpoint!r} with {checkpoint.tokenizer.kind} tokens and agent_pos of "
            f"{[domain.state_dim for domain in checkpoint.dynamics.domains]} dims; train one with: hma-gym train "
            "dynamics."
        )
    if options.compares_pixels and not isinstance(checkpoint.tokenizer, SoftTokenizer):
        raise InvalidArgument(
            f"pixel_weight must be 0 where the tokenizer is no SoftTokenizer, got {options.pixel_weight} and a "
            f"{type(checkpoint.tokenizer).__name__} in {options.checkpoint!r}; set it to 0, and leave decoder out."
        )
    return checkpoint


def _in_size(options: LookOptions, checkpoint: Checkpoint, trained: set[str]) -> Checkpoint:
    """The checkpoint with ``look`` of the size that is asked for."""
    had, drawing = checkpoint.dynamics.config.body, set(drawing_bodies(checkpoint))
    width, layers = options.width or had.look_width, options.layers or had.look_layers
    if (width, layers) == (had.look_width, had.look_layers):
        return checkpoint
    if trained != drawing:
        raise InvalidArgument(
            f"width and layers are those of all domains, so in another size ({width} x {layers}, before "
            f"{had.look_width} x {had.look_layers}) data must be of {sorted(drawing)}, got {sorted(trained)}; add "
            "files, or leave width and layers out."
        )
    return dataclasses.replace(checkpoint, dynamics=resized(checkpoint.dynamics, width, layers))


def train_config(options: LookOptions, checkpoint: Checkpoint, sources: Mapping[str, Source]) -> TrainConfig:
    """The loop's configuration."""
    body = checkpoint.dynamics.config.body
    return TrainConfig(
        out=options.out,
        steps=options.steps,
        schedule_minutes=None if options.steps is not None else options.minutes,
        max_minutes=options.max_minutes,
        optimizer=OptimizerConfig(lr=options.lr, weight_decay=1e-3, betas=(0.9, 0.98)),
        warmup_steps=min(200, options.steps // 5 if options.steps else 200),
        decay="cosine",
        ema_decay=0.998,
        precision="bf16",
        device=options.device,
        seed=options.seed,
        evaluation=Every(minutes=3.0),
        checkpoint=Every(minutes=4.0),
        prefetch=4 if options.device.startswith("cuda") else 0,
        recipe={
            "checkpoint": checkpoint.digest,
            "look": [body.look_width, body.look_layers],
            "data": {name: len(source.cache.tokens) for name, source in sources.items()},
            **{name: getattr(options, name) for name in DRAWN},
        },
    )


def write_checkpoint(options: LookOptions, checkpoint: Checkpoint, result: TrainResult, half: bool) -> Path:
    """Write it with the weights that it has now, and its card as it was."""
    recipe = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    for key in ("checkpoint", "data", "out"):  # of the machine it was trained on
        recipe.pop(key)
    scores = {key: value for key, value in result.evaluation.items() if math.isfinite(value)}
    told = {"recipe": recipe, "from": checkpoint.digest, "steps": result.step, "validation": scores}
    try:
        card = (checkpoint_folder(options.checkpoint) / "README.md").read_text()
    except OSError as error:
        raise StorageError(
            f"checkpoint {options.checkpoint!r} must have a readable README.md: {error}; fetch it again."
        ) from error
    changed = dataclasses.replace(checkpoint, provenance={**checkpoint.provenance, "look": told})
    return save_checkpoint(changed, options.out / "checkpoint", half=half, card=card)


def train_look(options: LookOptions) -> TrainResult:
    """Encode, train, and write ``<out>/checkpoint``. Interrupted, it saves; called again, it goes on.

    Raises:
        InvalidArgument: an option does not fit the checkpoint, or this would be written over.
        UnknownName: a file is of no domain that the checkpoint draws.
        CheckpointError: the checkpoint cannot be read.
        DatasetError: the data cannot be read, or is not of the checkpoint's domains.
        ResumeError: ``out`` holds a run with other options, another checkpoint or other data.
    """
    began = time.monotonic()
    torch.manual_seed(options.seed)
    checkpoint = _read_checkpoint(options)
    names = options.names
    if not names and len(checkpoint.dynamics.domains) == 1:
        names = (checkpoint.domain.name,) * len(options.data)
    files = files_of_domains(options.data, names)
    for name in files.keys() - drawing_bodies(checkpoint).keys():
        raise UnknownName("domain", name, list(drawing_bodies(checkpoint)), "Tell with names which one a file is of.")
    half = fits_half(checkpoint)
    checkpoint = _in_size(options, checkpoint, set(files))
    bodies, tokenizer = drawing_bodies(checkpoint), checkpoint.tokenizer
    sources = {name: make_source(name, found, bodies[name], tokenizer, options) for name, found in files.items()}
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = LookTraining({name: bodies[name] for name in sources}, tokenizer, options)
    config = train_config(options, checkpoint, sources).since(began)
    result = train(model, LookBatches(sources, options), config, evaluate=LookValidation(sources))
    with result.ema.applied_to(model):
        write_checkpoint(options, checkpoint, result, half)
        if options.decoder:
            save_tokenizer(tokenizer, options.out / "tokenizer")
    return result
