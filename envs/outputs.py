"""How a vector environment hands out its results: NumPy arrays on the host, or torch tensors on the device.

Infos follow Gymnasium's vector format: each key with its array and, under ``_key``, a mask of the environments that
have a value (elsewhere it is zero). Whatever is handed out is a copy that the environment never touches again.

Shape legend: N environments, H W image, P agent_pos dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hma_gym.errors import InvalidArgument

Mask = NDArray[np.bool_]
Observations = Tensor | dict[str, Tensor]


def on_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of host values on a device, for which nothing waits."""
    if device.type != "cuda":
        return torch.tensor(values, device=device)
    if values.size and (values == values.flat[0]).all():  # no copy at all: the usual case
        dtype = torch.from_numpy(values[:0]).dtype
        return torch.full(values.shape, values.flat[0].item(), dtype=dtype, device=device)
    return torch.tensor(values).pin_memory().to(device, non_blocking=True)


class Output(Protocol):
    """One way to hand out results. ``values`` are (N,) tensors on the device."""

    def observations(self, observations: Observations) -> Any:
        """Images (N, ..., H, W, 3), or a dict with ``pixels`` and ``agent_pos`` (N, ..., P)."""
        ...

    def rewards(self, rewards_N: Tensor) -> Any:
        """Sums of rewards."""
        ...

    def mask(self, mask_N: Mask) -> Any:
        """Terminations, truncations, or any other mask of environments."""
        ...

    def counts(self, counts_N: NDArray[np.int64]) -> Any:
        """Numbers of steps."""
        ...

    def infos(self, values: Mapping[str, Tensor], mask_N: Mask) -> dict[str, Any]:
        """Infos of the environments in the mask."""
        ...

    def final_infos(self, observations: Observations, values: Mapping[str, Tensor], mask_N: Mask) -> dict[str, Any]:
        """``final_obs`` and ``final_info`` of the episodes that ended in this very step (SAME_STEP)."""
        ...


class NumpyOutput:
    """What ``SyncVectorEnv`` gives: float64 rewards, ``final_obs`` as an object array of single observations."""

    def observations(self, observations: Observations) -> Any:
        """See :class:`Output`."""
        if isinstance(observations, dict):
            return {key: _host(value) for key, value in observations.items()}
        return _host(observations)

    def rewards(self, rewards_N: Tensor) -> NDArray[np.float64]:
        """See :class:`Output`."""
        return _host(rewards_N).astype(np.float64)

    def mask(self, mask_N: Mask) -> Mask:
        """See :class:`Output`."""
        return mask_N.copy()

    def counts(self, counts_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """See :class:`Output`."""
        return counts_N.copy()

    def infos(self, values: Mapping[str, Tensor], mask_N: Mask) -> dict[str, Any]:
        """See :class:`Output`."""
        infos: dict[str, Any] = {}
        if mask_N.any():
            for key, value in values.items():
                value_N = _host(value)
                if value_N.dtype == np.float32:
                    value_N = value_N.astype(np.float64)
                infos[key] = np.where(mask_N, value_N, np.zeros((), value_N.dtype))
                infos[f"_{key}"] = mask_N.copy()
        return infos

    def final_infos(self, observations: Observations, values: Mapping[str, Tensor], mask_N: Mask) -> dict[str, Any]:
        """See :class:`Output`."""
        if not mask_N.any():
            return {}
        batch = self.observations(observations)
        final_obs = np.full(len(mask_N), None, dtype=object)
        for i in np.flatnonzero(mask_N):
            final_obs[i] = {k: v[i].copy() for k, v in batch.items()} if isinstance(batch, dict) else batch[i].copy()
        return {
            "final_obs": final_obs,
            "_final_obs": mask_N.copy(),
            "final_info": self.infos(values, mask_N),
            "_final_info": mask_N.copy(),
        }


class TorchOutput:
    """Tensors on the device: float32 rewards, ``final_obs`` as one batch (rows outside its mask mean nothing)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def observations(self, observations: Observations) -> Any:
        """See :class:`Output`."""
        if isinstance(observations, dict):
            return {key: value.clone() for key, value in observations.items()}
        return observations.clone()

    def rewards(self, rewards_N: Tensor) -> Tensor:
        """See :class:`Output`."""
        return rewards_N.clone()

    def mask(self, mask_N: Mask) -> Tensor:
        """See :class:`Output`."""
        return on_device(mask_N, self._device)

    def counts(self, counts_N: NDArray[np.int64]) -> Tensor:
        """See :class:`Output`."""
        return on_device(counts_N, self._device)

    def infos(self, values: Mapping[str, Tensor], mask_N: Mask) -> dict[str, Any]:
        """See :class:`Output`."""
        infos: dict[str, Any] = {}
        if mask_N.any():
            for key, value in values.items():
                mask = self.mask(mask_N)
                infos[key] = torch.where(mask, value, torch.zeros_like(value))
                infos[f"_{key}"] = mask
        return infos

    def final_infos(self, observations: Observations, values: Mapping[str, Tensor], mask_N: Mask) -> dict[str, Any]:
        """See :class:`Output`."""
        if not mask_N.any():
            return {}
        return {
            "final_obs": self.observations(observations),
            "_final_obs": self.mask(mask_N),
            "final_info": self.infos(values, mask_N),
            "_final_info": self.mask(mask_N),
        }


def make_output(name: str, device: torch.device) -> Output:
    """``numpy`` or ``torch``."""
    if name == "numpy":
        return NumpyOutput()
    if name == "torch":
        return TorchOutput(device)
    raise InvalidArgument(f"output must be one of ['numpy', 'torch'], got {name!r}.")


def _host(x: Tensor) -> NDArray[Any]:
    return np.array(x.cpu().numpy())
