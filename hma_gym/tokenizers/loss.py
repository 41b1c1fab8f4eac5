"""What a tokenizer's reconstruction is trained for: every pixel, and more so those that matter to a robot.

A plain mean is ruled by the table and the wall. Pixels that differ from the background, that change between
neighbouring frames, or that have the colour of the object in play, weigh more; so the few pixels of a small
cube are never the cheapest ones to give up.

Shape legend: B batch, H W frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hma_gym.errors import InvalidArgument

FOREGROUND_DIFFERENCE = 0.1
"""A pixel is foreground where a channel differs from the background by more than this, of 1."""
CHANGE_DIFFERENCE = 0.04
"""A pixel changes where a channel differs between neighbouring frames by more than this, of 1."""
FOCUS_CHROMA = 0.15
"""A pixel has the focus colour where its chroma along that colour's chroma exceeds this, of 1."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the reconstruction loss. A pixel weighs 1 plus those of the following that apply.

    Attributes:
        foreground: added where the frame differs from the background.
        change: added where it differs from its neighbour in time.
        focus: added where it has the focus colour.
        focus_colour: RGB in [0, 1], the colour of the object in play (Lift's cube is red); None for no such object.
        absolute: weight of the absolute error beside the squared one.
    """

    foreground: float = 3.0
    change: float = 3.0
    focus: float = 6.0
    focus_colour: tuple[float, float, float] | None = None
    absolute: float = 0.01

    def __post_init__(self) -> None:
        for name in ("foreground", "change", "focus", "absolute"):
            if getattr(self, name) < 0.0:
                raise InvalidArgument(f"loss.{name} must be 0 or more, got {getattr(self, name)}")
        if self.focus_colour is not None and max(self.focus_colour) - min(self.focus_colour) <= 0.0:
            raise InvalidArgument(
                f"loss.focus_colour must not be a grey, got {self.focus_colour}; give an RGB in [0, 1]"
            )


def foreground_mask(images_B3HW: torch.Tensor, background_3HW: torch.Tensor) -> torch.Tensor:
    """Bool (B, H, W): where the images in [0, 1] differ from the background."""
    return (images_B3HW - background_3HW).abs().amax(1) > FOREGROUND_DIFFERENCE


def change_mask(images_B3HW: torch.Tensor, neighbours_B3HW: torch.Tensor) -> torch.Tensor:
    """Bool (B, H, W): where the images differ from the frames before or after them."""
    return (images_B3HW - neighbours_B3HW).abs().amax(1) > CHANGE_DIFFERENCE


def focus_mask(images_B3HW: torch.Tensor, focus_colour: tuple[float, float, float]) -> torch.Tensor:
    """Bool (B, H, W): where the images have the focus colour (its hue, with some saturation)."""
    colour_3 = torch.tensor(focus_colour, dtype=images_B3HW.dtype, device=images_B3HW.device)
    chroma_3 = colour_3 - colour_3.mean()
    direction_3 = chroma_3 / chroma_3.norm()
    chroma_B3HW = images_B3HW - images_B3HW.mean(1, keepdim=True)
    return torch.einsum("bchw,c->bhw", chroma_B3HW, direction_3) > FOCUS_CHROMA


def pixel_weights(
    images_B3HW: torch.Tensor, neighbours_B3HW: torch.Tensor, background_3HW: torch.Tensor, config: LossConfig
) -> torch.Tensor:
    """Weights (B, H, W), 1 or more."""
    weights_BHW = 1.0 + config.foreground * foreground_mask(images_B3HW, background_3HW)
    weights_BHW = weights_BHW + config.change * change_mask(images_B3HW, neighbours_B3HW)
    if config.focus_colour is not None:
        weights_BHW = weights_BHW + config.focus * focus_mask(images_B3HW, config.focus_colour)
    return weights_BHW


def reconstruction_loss(
    outputs_B3HW: torch.Tensor, images_B3HW: torch.Tensor, weights_BHW: torch.Tensor, config: LossConfig
) -> torch.Tensor:
    """Weighted mean of the squared (and a little of the absolute) error, a scalar."""
    error_B3HW = outputs_B3HW.float() - images_B3HW
    penalty_BHW = (error_B3HW.square() + config.absolute * error_B3HW.abs()).mean(1)
    return (penalty_BHW * weights_BHW).sum() / weights_BHW.sum()
