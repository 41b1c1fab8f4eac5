"""Published autoencoders of the library diffusers as soft tokenizers: Stable Diffusion's, Stable Video Diffusion's ...

>>> tokenizer = load_autoencoder("stabilityai/stable-video-diffusion-img2vid", (256, 256), "vae")  # doctest: +SKIP
>>> tokenizer.set_statistics(frames_BHWC)  # of your own data  # doctest: +SKIP
>>> save_tokenizer(tokenizer, "runs/svd")  # for: hma-gym train dynamics --tokenizer runs/svd  # doctest: +SKIP

What is saved holds the weights and the library's configuration of them, so that a checkpoint needs the library (extra
``diffusion``) but no hub. A frame's latents are the mean of its posterior; each frame is encoded and decoded alone.

Shape legend: B batch, H W frame, h w token grid, C latent channels.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from hma_gym.errors import CheckpointError, InvalidArgument, UnknownName
from hma_gym.extras import require
from hma_gym.robomimic_compat import make_torchvision_importable
from hma_gym.tokenizers.protocol import TokenizerConfig
from hma_gym.tokenizers.standardised import StandardisedTokenizer

#: The library's image autoencoders that are known to work, and what their ``decode`` is told beside the latents.
AUTOENCODERS: Mapping[str, Mapping[str, Any]] = {
    "AutoencoderKL": {},
    "AutoencoderKLTemporalDecoder": {"num_frames": 1},
    "AutoencoderTiny": {},
    "AutoencoderDC": {},
}


@dataclass(frozen=True)
class AutoencoderConfig(TokenizerConfig):
    """Config of :class:`AutoencoderTokenizer`.

    Attributes:
        model: name of the library's class, one of :data:`AUTOENCODERS`.
        settings: the configuration that the library has for it, as JSON values.
    """

    kind: ClassVar[str] = "diffusers"

    model: str = "AutoencoderKL"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model not in AUTOENCODERS:
            raise UnknownName("autoencoder", self.model, list(AUTOENCODERS))


class AutoencoderTokenizer(StandardisedTokenizer):
    """An autoencoder of diffusers behind our protocol, with random weights until some are loaded.

    Raises MissingExtra where diffusers is not installed, InvalidArgument where it refuses the settings or the frames.
    """

    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        library = _library()
        try:
            kind = getattr(library, config.model)
            self.autoencoder: nn.Module = kind.from_config(dict(config.settings))
            with torch.device("meta"):
                probe = kind.from_config(dict(config.settings)).eval().to("meta")  # some weights ignore the context
            frame_B3HW = torch.zeros(1, 3, *config.image_size, device="meta")
            shape, back = _probe(probe, frame_B3HW, AUTOENCODERS[config.model])
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
            raise InvalidArgument(
                f"{config.model} of diffusers must take its settings and frames of {config.image_size}, got: {error}; "
                "choose an image_size that its downsampling divides"
            ) from error
        if back != frame_B3HW.shape:
            raise InvalidArgument(
                f"{config.model} turns frames of {config.image_size} into frames of {tuple(back[2:])}; choose an "
                "image_size that its downsampling divides"
            )
        self.channels, self.grid = shape[1], (shape[2], shape[3])
        self.vocabulary = ()
        scale, shift = (config.settings.get(name) for name in ("scaling_factor", "shift_factor"))
        self.register_buffer("latent_mean_C", torch.full((self.channels,), float(shift or 0.0)))
        self.register_buffer("latent_std_C", torch.full((self.channels,), 1.0 / float(scale or 1.0)))

    def frames_to_latents(self, frames_BHWC: torch.Tensor) -> torch.Tensor:
        images_B3HW = frames_BHWC.permute(0, 3, 1, 2).to(self.latent_std_C.dtype) / 127.5 - 1.0
        return _encode(self.autoencoder, images_B3HW)

    def latents_to_frames(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        images_B3HW = _decode(self.autoencoder, latents_BChw, AUTOENCODERS[self.config.model])
        return ((images_B3HW + 1.0) * 127.5).clamp(0.0, 255.0).round().to(torch.uint8).permute(0, 2, 3, 1)


def _library() -> Any:
    """diffusers, also beside a torchvision whose compiled part does not load here."""
    if importlib.util.find_spec("torchvision") is not None:
        make_torchvision_importable()
    return require("diffusers", extra="diffusion", purpose="published autoencoders")


def _encode(autoencoder: Any, images_B3HW: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w): the library gives them, or their distribution."""
    (encoded,) = autoencoder.encode(images_B3HW, return_dict=False)
    latents_BChw: torch.Tensor = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
    return latents_BChw


def _decode(autoencoder: Any, latents_BChw: torch.Tensor, told: Mapping[str, Any]) -> torch.Tensor:
    (images_B3HW,) = autoencoder.decode(latents_BChw, **told, return_dict=False)
    assert isinstance(images_B3HW, torch.Tensor)
    return images_B3HW


@torch.no_grad()
def _probe(autoencoder: Any, images_B3HW: torch.Tensor, told: Mapping[str, Any]) -> tuple[torch.Size, torch.Size]:
    """The shapes of the latents and of the images made of them."""
    latents_BChw = _encode(autoencoder, images_B3HW)
    return latents_BChw.shape, _decode(autoencoder, latents_BChw, told).shape


def load_autoencoder(
    source: str | Path, image_size: tuple[int, int], subfolder: str | None = None
) -> AutoencoderTokenizer:
    """A published autoencoder as a tokenizer, on CPU, in eval mode.

    Its statistics are those that the library's configuration names (``scaling_factor``); measure them on your own
    frames with ``set_statistics`` before training on its tokens.

    Args:
        source: a folder that diffusers' ``save_pretrained`` wrote, or a hub id (then it is downloaded).
        image_size: (height, width) of the frames.
        subfolder: where in the source it lies, ``"vae"`` for most pipelines.

    Raises:
        CheckpointError: nothing there, damaged, no safetensors, or no autoencoder that is known to work.
        InvalidArgument: an image size that it does not take.
        MissingExtra: diffusers is not installed.
    """
    library = _library()
    where = str(source) if subfolder is None else f"{source}/{subfolder}"
    try:
        settings = library.AutoencoderKL.load_config(str(source), subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"autoencoder {where!r} must be a folder or hub id with a config.json of diffusers: {error}; name its "
            "subfolder where it is part of a pipeline ('vae')"
        ) from error
    name = str(settings.get("_class_name"))
    if name not in AUTOENCODERS:
        raise CheckpointError(f"autoencoder {where!r} is a {name}; known to work are {sorted(AUTOENCODERS)}")
    try:
        loaded = getattr(library, name).from_pretrained(str(source), subfolder=subfolder, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"autoencoder {where!r} is damaged or has no safetensors: {error}") from error
    public = {key: value for key, value in loaded.config.items() if not key.startswith("_")}
    config = AutoencoderConfig(image_size, name, json.loads(json.dumps(public)))
    tokenizer = AutoencoderTokenizer(config)
    tokenizer.autoencoder.load_state_dict(loaded.state_dict())
    return tokenizer.eval()
