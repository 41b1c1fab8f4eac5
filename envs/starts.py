"""The options of ``reset``: where an episode of a learned environment begins.

* nothing: a start drawn from the checkpoint's bank;
* ``start``: index (or one per environment) into the bank;
* ``image`` and ``agent_pos``: your own frame;
* ``images``, ``actions`` and ``agent_pos``: several of your own frames, and the actions between them;
* ``reset_mask`` (vector environments): reset these only.

Shape legend: N environments, T frames, H W image, A numbers of an action, P agent_pos dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hma_gym.envs.world import Context, LearnedWorld
from hma_gym.errors import InvalidArgument, InvalidImage

Mask = NDArray[np.bool_]
KNOWN = ("start", "image", "images", "actions", "agent_pos", "reset_mask")


@dataclass(frozen=True)
class StartOptions:
    """Checked options.

    Attributes:
        mask_N: which environments are reset.
        start_N: int64 index into the bank; -1 where it is drawn.
        context: own frames in place of the bank (leading 1 or N), or None.
    """

    mask_N: Mask
    start_N: NDArray[np.int64]
    context: Context | None


def read_options(options: Mapping[str, Any] | None, num_envs: int, world: LearnedWorld) -> StartOptions:
    """Check what was passed to ``reset``.

    Raises:
        InvalidArgument: unknown or contradicting keys, an index outside the bank, wrong shapes.
        InvalidImage: an image of another size or dtype.
    """
    options = {} if options is None else options
    unknown = sorted(str(key) for key in options if key not in KNOWN)
    if unknown:
        raise InvalidArgument(f"options: unknown keys {unknown}; a learned environment knows {list(KNOWN)}.")
    sources = [name for name in ("start", "image", "images") if name in options]
    if len(sources) > 1:
        raise InvalidArgument(f"options: an episode begins at one of start, image and images, got {sources}.")
    if "agent_pos" in options and not {"image", "images"} & options.keys():
        raise InvalidArgument("options['agent_pos'] belongs to options['image'] or options['images'], got it alone.")
    if "actions" in options and "images" not in options:
        raise InvalidArgument("options['actions'] belongs to options['images'], got it without.")
    mask_N = _mask(options.get("reset_mask"), num_envs)
    start_N = np.full(num_envs, -1, dtype=np.int64)
    if "start" in options:
        start_N = _starts(options["start"], num_envs, len(world.bank))
    context = None
    if "image" in options:
        frames = _frames(options["image"], "image", 3, num_envs, world)[:, None]
        actions = np.zeros((len(frames), 0, world.action_size), np.float32)
        context = Context(frames, actions, _agent_pos(options, frames, 1, num_envs, world))
    elif "images" in options:
        frames = _frames(options["images"], "images", 4, num_envs, world)
        actions = _actions(options.get("actions"), frames.shape[1], num_envs, world)
        context = Context(frames, actions, _agent_pos(options, frames, 2, num_envs, world))
    return StartOptions(mask_N, start_N, context)


def _mask(value: object, num_envs: int) -> Mask:
    if value is None:
        return np.ones(num_envs, dtype=bool)
    mask = _array(value, "reset_mask")
    if mask.dtype != np.bool_ or mask.shape != (num_envs,) or not mask.any():
        raise InvalidArgument(
            f"options['reset_mask'] must be a bool array of shape ({num_envs},) with at least one True, got "
            f"{mask.dtype} of shape {mask.shape} with {int(mask.astype(bool).sum())} True."
        )
    return mask


def _starts(value: object, num_envs: int, known: int) -> NDArray[np.int64]:
    index = _array(value, "start")
    if index.dtype.kind not in "iu" or index.shape not in ((), (num_envs,)):
        raise InvalidArgument(
            f"options['start'] must be an integer or an integer array of shape ({num_envs},), got {index.dtype} of "
            f"shape {index.shape}."
        )
    if index.min() < 0 or index.max() >= known:
        raise InvalidArgument(
            f"options['start'] must lie in [0, {known}), the size of the checkpoint's bank, got {index.tolist()}."
        )
    return np.broadcast_to(index, (num_envs,)).astype(np.int64)


def _frames(value: Any, name: str, ndim: int, num_envs: int, world: LearnedWorld) -> NDArray[np.uint8]:
    """With a leading dim of 1 (shared) or N."""
    array = _array(value, name)
    given = array.shape
    one = "(H, W, 3)" if ndim == 3 else "(T, H, W, 3)"
    if array.dtype != np.uint8:
        raise InvalidImage(f"options[{name!r}] must be uint8 in 0..255, got {array.dtype}; scale and convert it first.")
    if array.ndim == ndim:
        array = array[None]
    if array.ndim != ndim + 1 or array.shape[-3:] != (*world.image_size, 3) or array.shape[0] not in (1, num_envs):
        raise InvalidImage(
            f"options[{name!r}] must have shape {one} with H, W = {world.image_size}, or {num_envs} of them, got "
            f"{given}; resize to the checkpoint's image size and put the colour channels last."
        )
    if ndim == 4 and not array.shape[1]:
        raise InvalidImage(f"options[{name!r}] must hold at least one frame, got shape {given}.")
    return array


def _actions(value: object, frames: int, num_envs: int, world: LearnedWorld) -> NDArray[np.float32]:
    if value is None:
        raise InvalidArgument("options['images'] needs options['actions'], the actions between the frames.")
    array = _floats(value, "actions")
    shape = (frames - 1, world.action_size)
    if array.shape not in (shape, (num_envs, *shape)) or not np.isfinite(array).all():
        raise InvalidArgument(
            f"options['actions'] must be finite and of shape {shape} for {frames} frames, or {num_envs} of them, got "
            f"shape {array.shape}."
        )
    return array.reshape(-1, *shape)


def _agent_pos(
    options: Mapping[str, Any], frames: NDArray[np.uint8], ndim: int, num_envs: int, world: LearnedWorld
) -> NDArray[np.float32]:
    """(1 or N, 1 or T, P): every frame's, or only the first one's."""
    value, P = options.get("agent_pos"), world.domain.state_dim
    T = frames.shape[1]
    shape = (P,) if ndim == 1 else (T, P)
    if P == 0:
        if value is not None:
            raise InvalidArgument(f"options['agent_pos']: domain {world.domain.name!r} has none; leave it out.")
        return np.zeros((1, 1, 0), np.float32)
    if isinstance(value, str) and value == "nearest":
        return np.stack([world.start_agent_pos(world.nearest_start(row[0])) for row in frames])[:, None]
    if value is None or isinstance(value, str):
        raise InvalidArgument(
            f"options['agent_pos'] must be given with your own image: {P} numbers for where the arm is in it (for "
            "the tasks: hand position 3 m, quaternion 4 xyzw, fingers 2 m), or 'nearest' to take those of the most "
            f"similar start of the bank; got {value!r}."
        )
    array = _floats(value, "agent_pos")
    if array.shape not in (shape, (num_envs, *shape)) or not np.isfinite(array).all():
        raise InvalidArgument(
            f"options['agent_pos'] must be finite and of shape {shape}, or {num_envs} of them, got shape {array.shape}."
        )
    return array.reshape(-1, T if ndim == 2 else 1, P)


def _array(value: object, name: str) -> NDArray[Any]:
    try:
        return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"options[{name!r}] must be an array, got {type(value).__name__}: {error}.") from error


def _floats(value: object, name: str) -> NDArray[np.float32]:
    array = _array(value, name)
    if array.dtype.kind not in "fiu":
        raise InvalidArgument(f"options[{name!r}] must be an array of numbers, got {array.dtype}.")
    return array.astype(np.float32)
