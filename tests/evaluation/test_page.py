"""The HTML page is self-contained and safe; the videos are playable."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from hma_gym.errors import InvalidImage, StorageError
from hma_gym.evaluation.page import Heading, Picture, Table, Text, Video, render_page, write_video


def _decode(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    command = (imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape)


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    frames = np.zeros((6, 32, 48, 3), dtype=np.uint8)
    frames[:, :, :24, 0] = 200
    video = write_video(tmp_path / "deep" / "clip.mp4", frames, fps=20)
    page = render_page(
        "Report <one>",
        [
            Heading("A & B"),
            Text("x < y"),
            Text("import hma_gym", code=True),
            Table(("name", "right"), (("first", "yes"), ("<script>", "no"))),
            Picture(Image.new("RGB", (4, 4), "red"), "a red square"),
            Video(video, "a clip"),
        ],
    )
    assert "<script>" not in page and "Report &lt;one&gt;" in page and "x &lt; y" in page
    assert '<td class="yes">yes</td>' in page and '<td class="no">no</td>' in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 and all(source.startswith("data:") for source in sources)
    assert np.abs(_decode(video, frames.shape).astype(int) - frames).mean() < 12
    with pytest.raises(InvalidImage, match="even height"):
        write_video(tmp_path / "odd.mp4", frames[:, :31], fps=20)
    with pytest.raises(StorageError, match="another folder"):
        write_video(tmp_path / "deep" / "clip.mp4" / "below.mp4", frames, fps=20)
