"""Observation spaces, in one place, so that learned and ground-truth environments have the same ones.

Shape legend: H W image, P agent_pos dims.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from hma_gym.errors import InvalidArgument

ObsType = Literal["pixels", "pixels_agent_pos"]

#: Bound of every agent_pos dim of the tasks: metres from the world's origin, quaternion parts, finger widths.
AGENT_POS_BOUND = 2.0


def check_obs_type(obs_type: str) -> None:
    """Raise :class:`InvalidArgument` unless ``obs_type`` is one of the two."""
    if obs_type not in get_args(ObsType):
        raise InvalidArgument(f"obs_type must be one of {list(get_args(ObsType))}, got {obs_type!r}.")


def pixels_space(image_size: tuple[int, int]) -> spaces.Box:
    """uint8 images (H, W, 3)."""
    return spaces.Box(0, 255, (*image_size, 3), np.uint8)


def agent_pos_space(
    dim: int,
    low: float | NDArray[np.floating[Any]] = -AGENT_POS_BOUND,
    high: float | NDArray[np.floating[Any]] = AGENT_POS_BOUND,
) -> spaces.Box:
    """float32 proprioception (P,), within finite bounds."""
    return spaces.Box(low, high, (dim,), np.float32)


def observation_space(
    obs_type: ObsType, image_size: tuple[int, int], agent_pos: spaces.Box
) -> spaces.Box | spaces.Dict:
    """``pixels``: the image alone; ``pixels_agent_pos``: a dict of both, after LeRobot's convention."""
    check_obs_type(obs_type)
    pixels = pixels_space(image_size)
    if obs_type == "pixels":
        return pixels
    return spaces.Dict({"pixels": pixels, "agent_pos": agent_pos})
