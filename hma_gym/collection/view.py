"""Pictures of a dataset: ``hma-gym data view FILE`` makes a contact sheet (PNG) and a film (mp4).

Each chosen episode shows what it was meant to be, what became of it, and its actions: seven bars around a
zero line, three translations (blue), three rotations (amber), and the gripper (grey; up closes, down opens).

Shape legend: T rows, H W height and width, A action dims.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import Dataset, open_dataset, storage_errors
from hma_gym.errors import InvalidArgument

_PAPER, _INK, _FAINT = (234, 234, 231), (32, 34, 38), (188, 188, 184)
_GOOD, _BAD, _LOST = (38, 135, 78), (190, 62, 50), (214, 128, 20)
_BAR_COLOURS = ((52, 106, 176),) * 3 + ((214, 160, 44),) * 3 + ((110, 110, 116),)
_BARS_HEIGHT, _GAP, _CAPTION_WIDTH, _LINE = 30, 6, 168, 16


@dataclass(frozen=True)
class ViewConfig:
    """Make a contact sheet and a film of some episodes.

    Attributes:
        file: robomimic HDF5 file, or the ``.parts`` folder of one that is being recorded.
        out: folder for ``contact_sheet.png`` and ``episodes.mp4``; default: FILE with ``_view`` for its suffix.
        demos: numbers of the demos (``demo_<number>``); by default ``count`` of them, every category in turn.
        count: how many, where ``demos`` is empty.
        frames: frames per episode on the contact sheet.
        tile: width of a frame on the contact sheet, pixels; half as much again in the film.
        fps: frames per second of the film; 10 shows a 20 Hz task at half its speed.
    """

    file: Path
    out: Path | None = None
    demos: tuple[int, ...] = ()
    count: int = 12
    frames: int = 8
    tile: int = 128
    fps: float = 10.0

    def __post_init__(self) -> None:
        if self.count < 1 or self.frames < 2 or self.tile < 32 or not self.fps > 0:
            raise InvalidArgument(
                "a view needs count >= 1, frames >= 2, tile >= 32 and fps > 0, got "
                f"count={self.count}, frames={self.frames}, tile={self.tile}, fps={self.fps}."
            )


def view(config: ViewConfig) -> tuple[Path, Path]:
    """Make both pictures; returns the paths of the PNG and of the mp4.

    Raises:
        DatasetError: the dataset cannot be read, or has no images.
        InvalidArgument: a chosen demo is not in it.
        StorageError: the folder cannot be written.
    """
    dataset = open_dataset(config.file)
    positions = choose(dataset, config.demos, config.count)
    names = [dataset.demos[position].name for position in positions]
    episodes = [dataset[position] for position in positions]
    out = config.out or config.file.with_name(config.file.stem + "_view")
    sheet_path, film_path = out / "contact_sheet.png", out / "episodes.mp4"
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        contact_sheet(names, episodes, frames=config.frames, tile=config.tile).save(sheet_path)
        frames_THWC = np.stack(film(names, episodes, tile=config.tile * 3 // 2, hold=round(config.fps)))
        imageio.imwrite(film_path, frames_THWC, fps=config.fps, macro_block_size=2, quality=8)
    return sheet_path, film_path


def choose(dataset: Dataset, demos: Sequence[int], count: int) -> list[int]:
    """Positions of the named demos; or, for none, ``count`` spread evenly over the episodes of every category.

    Raises:
        InvalidArgument: a demo is not in the dataset.
    """
    if demos:
        position_of = {demo.index: position for position, demo in enumerate(dataset.demos)}
        missing = [number for number in demos if number not in position_of]
        if missing:
            raise InvalidArgument(
                f"demos must be numbers of demos in {str(dataset.path)!r} ({min(position_of)} to {max(position_of)}), "
                f"got {missing}."
            )
        return [position_of[number] for number in demos]
    groups: dict[str, list[int]] = {}
    for position, category in enumerate(dataset.column("category")):
        groups.setdefault(str(category), []).append(position)
    shares = {name: 0 for name in groups}
    for _ in range(min(count, len(dataset))):
        open_groups = [name for name in sorted(groups) if shares[name] < len(groups[name])]
        shares[min(open_groups, key=lambda name: shares[name])] += 1
    return [
        groups[name][int(pick)]
        for name in sorted(groups)
        for pick in np.linspace(0, len(groups[name]) - 1, shares[name]).round()
    ]


def contact_sheet(names: Sequence[str], episodes: Sequence[Episode], *, frames: int, tile: int) -> Image.Image:
    """One line per episode: its caption, then ``frames`` frames from first to last, the actions under each."""
    line = tile + _BARS_HEIGHT + 2 * _GAP
    width = _CAPTION_WIDTH + frames * (tile + _GAP) + _GAP
    sheet = Image.new("RGB", (width, line * len(episodes) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (name, episode) in enumerate(zip(names, episodes, strict=True)):
        top = _GAP + number * line
        if number:
            draw.line((0, top - _GAP, width, top - _GAP), fill=_FAINT)
        _caption(draw, (_GAP * 2, top), name, episode)
        for column, row in enumerate(np.linspace(0, len(episode) - 1, frames).round().astype(int)):
            left = _CAPTION_WIDTH + column * (tile + _GAP)
            _tile(sheet, (left, top), episode, int(row), tile)
    return sheet


def film(names: Sequence[str], episodes: Sequence[Episode], *, tile: int, hold: int) -> list[NDArray[np.uint8]]:
    """All episodes at once in a grid, a shorter one resting on its last row; then ``hold`` still frames."""
    columns = math.ceil((len(episodes) * 1.5) ** 0.5)
    cell_width, cell_height = tile + 2 * _GAP, tile + _BARS_HEIGHT + 2 * _LINE + 3 * _GAP
    size = (columns * cell_width, -(-len(episodes) // columns) * cell_height)
    size = (size[0] + size[0] % 2, size[1] + size[1] % 2)
    frames = []
    for row in range(max(map(len, episodes))):
        canvas = Image.new("RGB", size, _PAPER)
        draw = ImageDraw.Draw(canvas)
        for number, (name, episode) in enumerate(zip(names, episodes, strict=True)):
            left, top = number % columns * cell_width + _GAP, number // columns * cell_height + _GAP
            word, colour = outcome(episode)
            draw.text((left, top), name, fill=_INK, font=_font(11))
            draw.text((left + tile, top), word, fill=colour, font=_font(11), anchor="ra")
            draw.text((left, top + _LINE), _intent(episode), fill=_INK, font=_font(10))
            _tile(canvas, (left, top + 2 * _LINE), episode, min(row, len(episode) - 1), tile)
        frames.append(np.asarray(canvas))
    return frames + frames[-1:] * hold


def outcome(episode: Episode) -> tuple[str, tuple[int, int, int]]:
    """What became of an episode, in a word, and the colour of that word."""
    if episode.attrs.get("success"):
        return "success", _GOOD
    if episode.attrs.get("success_ever"):
        return "dropped", _LOST
    return "failure", _BAD


def _intent(episode: Episode) -> str:
    mode = str(episode.attrs.get("mode", "unknown"))
    competence = episode.attrs.get("competence")
    return mode if competence is None else f"{mode}, {float(competence):.2f}"


def _caption(draw: ImageDraw.ImageDraw, at: tuple[int, int], name: str, episode: Episode) -> None:
    word, colour = outcome(episode)
    lines = (
        (name, _INK, 13),
        (word, colour, 13),
        (str(episode.attrs.get("category", "")), _INK, 11),
        (_intent(episode), _INK, 11),
        (str(episode.attrs.get("policy", "")), _INK, 11),
    )
    for number, (text, ink, size) in enumerate(lines):
        draw.text((at[0], at[1] + number * (_LINE + 3)), text, fill=ink, font=_font(size))


def _tile(canvas: Image.Image, at: tuple[int, int], episode: Episode, row: int, tile: int) -> None:
    """One frame with its row number, a green border where it shows success, and its action."""
    left, top = at
    draw = ImageDraw.Draw(canvas)
    picture = Image.fromarray(episode.images_THWC[row]).resize((tile, tile), Image.Resampling.BICUBIC)
    canvas.paste(picture, at)
    if row and episode.rewards_T[row - 1] > 0:
        draw.rectangle((left, top, left + tile - 1, top + tile - 1), outline=_GOOD, width=2)
    draw.text((left + 5, top + 3), str(row), fill="white", font=_font(11), stroke_width=1, stroke_fill=_INK)
    action_A = episode.actions_TA[row]
    zero, half = top + tile + _GAP + _BARS_HEIGHT // 2, _BARS_HEIGHT // 2 - 2
    pitch = tile / len(action_A)
    draw.line((left, zero, left + tile - 1, zero), fill=_FAINT)
    for dim, value in enumerate(np.clip(action_A, -1.0, 1.0)):
        edges = sorted((zero, zero - round(float(value) * half)))
        x = left + round(dim * pitch)
        draw.rectangle((x + 2, edges[0], x + round(pitch) - 3, edges[1]), fill=_BAR_COLOURS[min(dim, 6)])


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
