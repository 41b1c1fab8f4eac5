"""Recipes that train a tokenizer on the frames of a dataset of episodes.

    hma-gym train tokenizer --data lift.hdf5 --out runs/soft --kind soft --minutes 12

Two CPU cores; bf16 autocast. The scores to expect are in each recipe's docstring.

Shape legend: E episodes, T rows, B batch, H W frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hma_gym.data.episodes import apart
from hma_gym.data.robomimic_hdf5 import open_dataset
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.nn.parameters import ParameterGroup
from hma_gym.tokenizers import SoftConfig, SoftTokenizer, VQConfig, VQTokenizer
from hma_gym.tokenizers.conv import ConvTokenizer
from hma_gym.tokenizers.files import load_tokenizer, save_tokenizer
from hma_gym.tokenizers.loss import LossConfig, pixel_weights, reconstruction_loss
from hma_gym.tokenizers.quality import measure_quality
from hma_gym.training import Every, OptimizerConfig, TrainConfig, TrainResult, train

RED = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class TokenizerRecipe:
    """A whole training run.

    Attributes:
        data: robomimic HDF5 file, or its folder of parts while it is being recorded.
        tokenizer: what is trained; its ``image_size`` must be the data's.
        loss: see :class:`hma_gym.tokenizers.loss.LossConfig`.
        train: the loop's configuration; ``train.out`` is the run's folder, the result goes to ``<out>/tokenizer``.
        batch_size: frames a step.
        episodes: how many training episodes are read into memory, spread over a dataset; T * H * W * 3 bytes each.
        validation_episodes: how many validation episodes of a dataset are measured.
        batch_seed: of the frames drawn.
        more_data: further files (other robots or scenes) with images of the same size.
        start: a tokenizer's folder to start from: all of it where the configs agree, else (soft to vq, say) the
            tensors of the same name and shape. Its background stays the reference.
        decoder_only: keep the encoder, and so the tokens, exactly as in ``start``: frames get better, and what was
            trained on the tokens stays valid.
    """

    data: Path
    tokenizer: SoftConfig | VQConfig
    loss: LossConfig
    train: TrainConfig
    batch_size: int = 16
    episodes: int = 400
    validation_episodes: int = 8
    batch_seed: int = 0
    more_data: tuple[Path, ...] = ()
    start: Path | None = None
    decoder_only: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "episodes", "validation_episodes"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.decoder_only and self.start is None:
            raise InvalidArgument("decoder_only keeps the encoder of another tokenizer; name its folder with start")


@dataclass(frozen=True)
class TokenizerOptions:
    """Options of ``hma-gym train tokenizer``; everything else is the recipe's.

    Attributes:
        data: robomimic HDF5 file (or its ``.parts`` folder).
        out: folder of the run.
        kind: continuous latents, or indices of a finite scalar quantiser.
        minutes: length of the training.
        steps: length in steps, in place of minutes (then a resumed run is exact).
        image_size: height and width of the frames.
        focus_red: give red pixels extra weight (Lift's cube).
        episodes: training episodes read into memory.
        device: ``cpu`` or ``cuda``.
        seed: of everything random.
        more_data: further files (other robots or scenes) with images of the same size.
        start: folder of a tokenizer to start from, of either kind.
        decoder_only: train the decoder alone: the tokens stay those of ``start``.
    """

    data: Path
    out: Path
    kind: Literal["soft", "vq"] = "soft"
    minutes: float = 12.0
    steps: int | None = None
    image_size: tuple[int, int] = (64, 64)
    focus_red: bool = True
    episodes: int = 400
    device: str = "cpu"
    seed: int = 0
    more_data: tuple[Path, ...] = ()
    start: Path | None = None
    decoder_only: bool = False


def soft_recipe(options: TokenizerOptions) -> TokenizerRecipe:
    """Soft tokens, 8 channels, 8 x 8 for 64 x 64 frames.

    Lift, 230 episodes, one CPU core (AVX-512 bf16, 11 steps/s): 31 dB after 1800 steps, 34 dB after 7000 more
    (11 minutes); foreground 24.7 dB, cube 24.7 dB.
    """
    return _recipe(options, SoftConfig(image_size=options.image_size))


def vq_recipe(options: TokenizerOptions) -> TokenizerRecipe:
    """VQ tokens, 64,000 codes (levels 8, 8, 8, 5, 5, 5; factors of 512 and 125), 8 x 8 for 64 x 64 frames.

    Lift, 410 episodes, one CPU core: 31.6 dB after 20 minutes, foreground 21.2 dB, cube 22.3 dB.
    """
    tokenizer = VQConfig(image_size=options.image_size, levels=(8, 8, 8, 5, 5, 5), vocabulary=(512, 125))
    return _recipe(options, tokenizer)


RECIPES = {"soft": soft_recipe, "vq": vq_recipe}


def _recipe(options: TokenizerOptions, tokenizer: SoftConfig | VQConfig) -> TokenizerRecipe:
    loss = LossConfig(focus_colour=RED if options.focus_red else None)
    return TokenizerRecipe(
        data=options.data,
        tokenizer=tokenizer,
        loss=loss,
        episodes=options.episodes,
        batch_seed=options.seed,
        more_data=options.more_data,
        start=options.start,
        decoder_only=options.decoder_only,
        train=TrainConfig(
            out=options.out,
            steps=options.steps,
            schedule_minutes=None if options.steps is not None else options.minutes,
            optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98)),
            warmup_steps=200,
            decay="cosine",
            ema_decay=0.998,
            precision="bf16",
            device=options.device,
            seed=options.seed,
            evaluation=Every(minutes=4.0),
            recipe={
                "tokenizer": tokenizer.to_dict(),
                "loss": dataclasses.asdict(loss),
                "episodes": options.episodes,
                "decoder_only": options.decoder_only,
            },
        ),
    )


class TokenizerTraining(nn.Module):
    """A tokenizer with its loss: what the loop trains."""

    def __init__(self, tokenizer: ConvTokenizer, config: LossConfig) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.config = config

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch has ``frames`` and their ``neighbours`` in time, both (B, H, W, 3) uint8."""
        images_B3HW = self.tokenizer.to_images(batch["frames"])
        neighbours_B3HW = self.tokenizer.to_images(batch["neighbours"])
        weights_BHW = pixel_weights(images_B3HW, neighbours_B3HW, self.tokenizer.reference_3HW, self.config)
        outputs_B3HW = self.tokenizer.reconstruct(images_B3HW, generator)
        loss = reconstruction_loss(outputs_B3HW, images_B3HW, weights_BHW, self.config)
        with torch.no_grad():
            mean_square_B = (outputs_B3HW.float().clamp(0.0, 1.0) - images_B3HW).square().mean((1, 2, 3))
            psnr = (-10.0 * torch.log10(mean_square_B.clamp(min=1e-10))).mean()
        return loss, {"psnr": psnr}

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Kernels with weight decay; biases, norms, the background and the position map without."""
        kept = {id(self.tokenizer.background), id(self.tokenizer.decoder.position)}
        trained = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim >= 2 and id(p) not in kept]
        plain = [p for p in trained if p.ndim < 2 or id(p) in kept]
        return [ParameterGroup("kernels", decayed), ParameterGroup("plain", plain, weight_decay_multiplier=0.0)]


@dataclass(frozen=True)
class FrameBatches:
    """Random frames, each with the frame before or after it; a pure function of (seed, step).

    Attributes:
        episodes_THWC: uint8 images of the episodes, T >= 2 rows each.
        batch_size: B.
        seed: of the draw.
    """

    episodes_THWC: Sequence[NDArray[np.uint8]]
    batch_size: int
    seed: int = 0
    _ends: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = [len(images_THWC) for images_THWC in self.episodes_THWC]
        if not lengths or min(lengths) < 2:
            raise DatasetError(f"a tokenizer trains on episodes of at least 2 rows, got lengths {sorted(set(lengths))}")
        object.__setattr__(self, "_ends", np.cumsum(lengths))

    def batch(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, step))
        flat_B = rng.integers(self._ends[-1], size=self.batch_size)
        episode_B = np.searchsorted(self._ends, flat_B, side="right")
        forward_B = rng.random(self.batch_size) < 0.5
        frames, neighbours = [], []
        for flat, episode, forward in zip(flat_B, episode_B, forward_B, strict=True):
            images_THWC = self.episodes_THWC[episode]
            row = int(flat - (self._ends[episode] - len(images_THWC)))
            other = row + 1 if (forward and row + 1 < len(images_THWC)) or row == 0 else row - 1
            frames.append(images_THWC[row])
            neighbours.append(images_THWC[other])
        return {"frames": torch.from_numpy(np.stack(frames)), "neighbours": torch.from_numpy(np.stack(neighbours))}


def read_frames(path: Path, split: str, episodes: int, image_size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Images (T, H, W, 3) of at most so many episodes of a split, spread evenly over it; stills come one by one, each
    with itself for a neighbour.

    Raises DatasetError where the split is empty or the images have another size.
    """
    dataset = open_dataset(path)
    positions = list(dataset.split(split))
    if not positions:
        raise DatasetError(f"dataset {path} has no episode in its {split!r} split; record more or mark some for it")
    chosen = [positions[i] for i in np.linspace(0, len(positions) - 1, min(episodes, len(positions))).astype(int)]
    images = []
    for part in apart(dataset[position] for position in chosen):
        images.append(np.repeat(part.images_THWC, 2, axis=0) if part.still else part.images_THWC)
    if images[0].shape[1:3] != tuple(image_size):
        raise DatasetError(
            f"dataset {path} has images of {images[0].shape[1:3]} where the tokenizer's image_size is {image_size}; "
            "set image_size to the data's"
        )
    return images


def median_frame(episodes_THWC: Sequence[NDArray[np.uint8]], frames: int = 512) -> NDArray[np.uint8]:
    """The median (H, W, 3) uint8 of about so many frames, spread over all episodes: what mostly stands still."""
    each = max(1, frames // len(episodes_THWC))
    stride = max(1, len(episodes_THWC) // frames)
    chosen = [images[np.linspace(0, len(images) - 1, each).astype(int)] for images in episodes_THWC[::stride]]
    return np.median(np.concatenate(chosen), axis=0).astype(np.uint8)


def new_tokenizer(config: SoftConfig | VQConfig, background_HWC: NDArray[np.uint8]) -> SoftTokenizer | VQTokenizer:
    """An untrained tokenizer over this background."""
    background = torch.from_numpy(background_HWC)
    if isinstance(config, SoftConfig):
        return SoftTokenizer(config, background)
    return VQTokenizer(config, background)


def initial_tokenizer(recipe: TokenizerRecipe, images: Sequence[NDArray[np.uint8]]) -> SoftTokenizer | VQTokenizer:
    """What training starts from: fresh weights over the images' median frame, or those of ``recipe.start``.

    Raises InvalidArgument where ``start`` is no convolutional tokenizer, or ``decoder_only`` does not fit it.
    """
    if recipe.start is None:
        return new_tokenizer(recipe.tokenizer, median_frame(images))
    source = load_tokenizer(recipe.start)
    if not isinstance(source, (SoftTokenizer, VQTokenizer)) or source.image_size != recipe.tokenizer.image_size:
        raise InvalidArgument(
            f"start must be a soft or vq tokenizer for images of {recipe.tokenizer.image_size}, got {source.kind} for "
            f"{source.image_size} in {recipe.start}; leave start out to train from scratch"
        )
    if source.config == recipe.tokenizer:
        source.encoder.requires_grad_(not recipe.decoder_only)
        return source
    if recipe.decoder_only:
        raise InvalidArgument(
            f"decoder_only needs a start with the same config, got {source.config} in {recipe.start} "
            f"for {recipe.tokenizer}; train the whole tokenizer"
        )
    tokenizer = new_tokenizer(recipe.tokenizer, source.to_frames(source.reference_3HW[None])[0].numpy())
    own = tokenizer.state_dict()
    shared = {k: v for k, v in source.state_dict().items() if k in own and own[k].shape == v.shape}
    tokenizer.load_state_dict({**own, **shared})
    return tokenizer


def train_tokenizer(recipe: TokenizerRecipe) -> tuple[Path, TrainResult, dict[str, float]]:
    """Trains, measures and saves a tokenizer; resumable as the loop is.

    Returns:
        The saved tokenizer's folder, the loop's result, and the figures on validation episodes.
    """
    size = recipe.tokenizer.image_size
    files = (recipe.data, *recipe.more_data)
    images = [x for file in files for x in read_frames(file, "train", recipe.episodes, size)]
    valid = [x for file in files for x in read_frames(file, "valid", recipe.validation_episodes, size)]
    held_out = [torch.from_numpy(x) for x in valid]
    sample_BHWC = np.concatenate([x[:: max(1, len(x) // 8)] for x in images[:: max(1, len(images) // 128)]])
    torch.manual_seed(recipe.train.seed)
    tokenizer = initial_tokenizer(recipe, images)
    tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = TokenizerTraining(tokenizer, recipe.loss)

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        device = tokenizer.background.device
        if isinstance(tokenizer, SoftTokenizer) and not recipe.decoder_only:
            tokenizer.set_statistics(torch.from_numpy(sample_BHWC).to(device))
        background_HWC = tokenizer.to_frames(tokenizer.reference_3HW[None])[0]
        return measure_quality(tokenizer, [x.to(device) for x in held_out], background_HWC, recipe.loss.focus_colour)

    batches = FrameBatches(images, recipe.batch_size, recipe.batch_seed)
    result = train(model, batches, recipe.train, evaluate)
    model.load_state_dict(result.ema.state_dict(model))
    figures = evaluate(model, result.step)
    folder = save_tokenizer(tokenizer, recipe.train.out / "tokenizer")
    return folder, result, figures


def main(options: TokenizerOptions) -> dict[str, Any]:
    """``hma-gym train tokenizer``: prints and returns the figures."""
    recipe = RECIPES[options.kind](options)
    folder, result, figures = train_tokenizer(recipe)
    print(f"{options.kind} tokenizer after {result.step} steps ({result.minutes:.1f} minutes) in {folder}")
    for name, value in figures.items():
        print(f"  {name:18s} {value:.4g}")
    return {"folder": str(folder), "steps": result.step, **figures}
