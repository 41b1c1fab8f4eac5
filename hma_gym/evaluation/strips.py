"""Film strips: rows of frames with labels, as one picture to look at.

Shape legend: N frames in a strip, H W C image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hma_gym.errors import InvalidImage

GAP, MARGIN, LINE = 2, 8, 14
"""Pixels between frames, around the sheet, and per line of text."""


@dataclass(frozen=True)
class Strip:
    """One row of frames.

    Attributes:
        label: text at its left; each line break starts a new line.
        frames_NHWC: uint8.
    """

    label: str
    frames_NHWC: NDArray[np.uint8]


@dataclass(frozen=True)
class Panel:
    """Strips that belong together (truth above generated), under one heading."""

    title: str
    strips: tuple[Strip, ...]


def draw_sheet(
    panels: Sequence[Panel], columns: Sequence[str], *, title: str = "", scale: float = 1.5, label_width: int = 84
) -> Image.Image:
    """Draw panels one below another.

    Args:
        panels: each strip must have as many frames as there are columns, all of one size.
        columns: captions of the columns, e.g. the step of each frame.
        title: heading of the whole sheet.
        scale: enlargement of each frame.
        label_width: pixels left of the frames for the strips' labels.

    Raises:
        InvalidImage: a strip has another number or size of frames.
    """
    strips = [strip for panel in panels for strip in panel.strips]
    if not strips:
        raise InvalidImage("a sheet needs at least one strip, got none.")
    expected = (len(columns), *strips[0].frames_NHWC.shape[1:])
    for strip in strips:
        if strip.frames_NHWC.shape != expected or strip.frames_NHWC.dtype != np.uint8:
            raise InvalidImage(
                f"strip {strip.label!r} must be uint8 of shape {expected}, got {strip.frames_NHWC.dtype} "
                f"{strip.frames_NHWC.shape}; choose the same rows for all strips."
            )
    height, width = round(expected[1] * scale), round(expected[2] * scale)
    sheet_width = 2 * MARGIN + label_width + len(columns) * (width + GAP)
    top = MARGIN + (LINE + 4 if title else 0) + LINE
    panel_heights = [LINE + 2 + len(panel.strips) * (height + GAP) + MARGIN for panel in panels]
    sheet = Image.new("RGB", (sheet_width, top + sum(panel_heights)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    if title:
        draw.text((MARGIN, MARGIN), title, fill="black", font=ImageFont.load_default(size=13))
    for i, caption in enumerate(columns):
        x = MARGIN + label_width + i * (width + GAP)
        draw.text((x + width / 2, top - LINE), caption, fill="gray", font=font, anchor="ma")
    y = top
    for panel, panel_height in zip(panels, panel_heights, strict=True):
        draw.text((MARGIN, y), panel.title, fill="black", font=font)
        for row, strip in enumerate(panel.strips):
            row_y = y + LINE + 2 + row * (height + GAP)
            for line, text in enumerate(strip.label.split("\n")):
                draw.text((MARGIN, row_y + 2 + line * LINE), text, fill="black", font=font)
            for i, frame in enumerate(strip.frames_NHWC):
                tile = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(tile, (MARGIN + label_width + i * (width + GAP), row_y))
        y += panel_height
    return sheet
