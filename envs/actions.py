"""The one check of actions.

Shape legend: N environments, H steps of a chunk, A numbers of an action.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from hma_gym.envs.outputs import on_device
from hma_gym.errors import InvalidAction


def read_actions(actions: Any, leading: tuple[int | None, ...], box: spaces.Box, device: torch.device) -> Tensor:
    """Actions as a float32 tensor on the device, clipped to the bounds of the action space.

    Args:
        actions: floating, of shape (*leading, A); a tensor, an array or what NumPy makes one of.
        leading: sizes before A; None where any positive size is right.
        box: action space of one environment, shape (A,).

    Raises:
        InvalidAction: another shape or dtype, or a value that is not finite.
    """
    shape = (*leading, *box.shape)
    wanted = f"({', '.join('H' if size is None else str(size) for size in shape)}{',' if len(shape) == 1 else ''})"
    if isinstance(actions, Tensor):
        dtype, found, floating = str(actions.dtype), tuple(actions.shape), actions.is_floating_point()
    else:
        try:
            actions = np.asarray(actions)
        except ValueError as error:
            raise InvalidAction(f"actions must be an array of shape {wanted}, got {type(actions)}: {error}.") from error
        dtype, found, floating = str(actions.dtype), actions.shape, actions.dtype.kind == "f"
    if not floating:
        raise InvalidAction(f"actions must be of a floating dtype, got {dtype}; convert them with astype(np.float32).")
    if len(found) != len(shape) or any(
        not size or wish not in (None, size) for wish, size in zip(shape, found, strict=True)
    ):
        raise InvalidAction(
            f"actions must have shape {wanted}, got {found}: one row for each environment and one column for each of "
            f"the {box.shape[0]} dims of the action space."
        )
    if isinstance(actions, Tensor):
        if not bool(torch.isfinite(actions).all()):
            raise _not_finite(actions.detach().double().cpu().numpy())
        low, high = (on_device(bound, actions.device) for bound in (box.low, box.high))
        # The bounds are float32, and what exceeds that in a double is clipped before it is converted.
        return torch.clamp(actions.detach(), low, high).to(device, torch.float32)
    if not np.isfinite(actions).all():
        raise _not_finite(actions)
    return torch.from_numpy(np.clip(actions, box.low, box.high).astype(np.float32)).to(device)


def _not_finite(actions: NDArray[np.floating[Any]]) -> InvalidAction:
    where = tuple(np.argwhere(~np.isfinite(actions))[0].tolist())
    return InvalidAction(
        f"actions must be finite, got {actions[where]} at index {where}; check the policy's output (a NaN often comes "
        "from un-normalised inputs or a diverged network)."
    )
