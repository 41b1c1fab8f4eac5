"""The one check of actions.

Shape legend: N environments, H steps of a chunk, A numbers of an action.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

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
        tensor, dtype = actions.detach(), str(actions.dtype)
        floating = tensor.is_floating_point()
    else:
        try:
            array = np.asarray(actions)
        except ValueError as error:
            raise InvalidAction(f"actions must be an array of shape {wanted}, got {type(actions)}: {error}.") from error
        dtype, floating = str(array.dtype), array.dtype.kind == "f"
        # A double may overflow in single precision; clipped first, it cannot.
        tensor = torch.from_numpy(array.astype(np.float64)) if floating else torch.zeros(0)
    if not floating:
        raise InvalidAction(f"actions must be of a floating dtype, got {dtype}; convert them with astype(np.float32).")
    if len(tensor.shape) != len(shape) or any(
        size is not None and size != found or found == 0 for size, found in zip(shape, tensor.shape, strict=False)
    ):
        raise InvalidAction(
            f"actions must have shape {wanted}, got {tuple(tensor.shape)}: one row for each environment and one column "
            f"for each of the {box.shape[0]} dims of the action space."
        )
    if not bool(torch.isfinite(tensor).all()):
        where = tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
        raise InvalidAction(
            f"actions must be finite, got {tensor[where].item()} at index {where}; check the policy's output (a NaN "
            "often comes from un-normalised inputs or a diverged network)."
        )
    tensor = tensor.to(device)
    low, high = (torch.from_numpy(bound).to(device, tensor.dtype) for bound in (box.low, box.high))
    return torch.clamp(tensor, low, high).float()
