"""Frames to mp4 files that browsers play.

Shape legend: T frames, H W C image.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hma_gym.errors import InvalidImage, StorageError


def enlarge(frames_THWC: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Frames whose shorter side is at least ``side`` pixels, by an even factor, smoothly; large even ones unchanged.

    Video files halve the resolution of colours; at 64 x 64 a small cube would lose its own.
    """
    height, width = frames_THWC.shape[1:3]
    factor = -(-side // min(height, width))
    if factor <= 1 and not (height % 2 or width % 2):
        return frames_THWC
    factor += factor % 2
    size = (width * factor, height * factor)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames_THWC])


def write_video(path: Path, frames_THWC: NDArray[np.uint8], fps: float) -> Path:
    """Write frames as an H.264 mp4 that browsers play; height and width must be even.

    Raises:
        InvalidImage: frames of another dtype or shape, or with an odd side.
        StorageError: the file cannot be written.
    """
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or any(side % 2 for side in frames_THWC.shape[1:3]):
        raise InvalidImage(
            f"a video needs uint8 frames (T, H, W, 3) of even height and width, got {frames_THWC.dtype} "
            f"{frames_THWC.shape}; pad them by a pixel."
        )
    height, width = frames_THWC.shape[1:3]
    # ffmpeg itself, not imageio's writer: that one leaves its pipe for the garbage collector to close.
    command = (
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"),
        *("-an", "-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, input=np.ascontiguousarray(frames_THWC).tobytes(), capture_output=True)
    except OSError as error:
        raise StorageError(f"cannot write the video {str(path)!r}: {error}; choose another folder.") from error
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip()
        raise StorageError(f"cannot write the video {str(path)!r}: {reason}; choose another folder.")
    return path
