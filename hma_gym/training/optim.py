"""The optimiser: AdamW everywhere, or Muon for hidden matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hma_gym.errors import InvalidArgument, ResumeError
from hma_gym.nn.parameters import ParameterGroup


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights move.

    Attributes:
        name: ``"adamw"``, or ``"muon"``: :class:`torch.optim.Muon` (Jordan et al. 2024) for groups of kind "matrix" and
            AdamW for the others.
        lr: AdamW's peak learning rate.
        muon_lr: Muon's peak learning rate, the spectral norm of one update of a square matrix.
        weight_decay: decoupled; in each step a weight shrinks by ``lr(t) * weight_decay * weight_decay_multiplier``
            whatever its group's own rate is, so the decay does not change with the width or the optimiser.
        betas: AdamW's.
        eps: AdamW's.
        momentum: Muon's (Nesterov).
        newton_schulz_steps: Muon's iterations of orthogonalisation. Their cost depends on the matrices alone, not on
            the batch: for 12.6 M parameters on one CPU core a step took 0.41 s (AdamW 0.01 s), in proportion to them.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    muon_lr: float = 0.02
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    newton_schulz_steps: int = 5

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise InvalidArgument(f"optimizer.name must be 'adamw' or 'muon', got {self.name!r}.")
        for field in ("lr", "muon_lr"):
            if not getattr(self, field) > 0:
                raise InvalidArgument(f"optimizer.{field} must be positive, got {getattr(self, field)}.")
        if self.newton_schulz_steps < 1:
            raise InvalidArgument(
                f"optimizer.newton_schulz_steps must be 1 or more, got {self.newton_schulz_steps}; 5 is usual."
            )
        if self.weight_decay < 0:
            raise InvalidArgument(f"optimizer.weight_decay must be 0 or more, got {self.weight_decay}.")


class Optimizer:
    """The torch optimisers of one model behind one ``step``.

    Raises:
        InvalidArgument: a trainable parameter is in no group or in two, or a "matrix" is not 2-D.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ParameterGroup], config: OptimizerConfig) -> None:
        self.names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        _check_groups(groups, self.names)
        muon_rows: list[dict[str, Any]] = []
        adamw_rows: list[dict[str, Any]] = []
        for group in groups:
            with_muon = config.name == "muon" and group.kind == "matrix"
            peak = (
                config.muon_lr * group.lr_multiplier
                if with_muon
                else config.lr * group.lr_multiplier / group.width_ratio
            )
            row = {
                "params": [p for p in group.parameters if p.requires_grad],
                "lr": peak,
                "peak_lr": peak,
                "weight_decay": config.weight_decay * group.weight_decay_multiplier * config.lr / peak,
            }
            if row["params"]:
                (muon_rows if with_muon else adamw_rows).append(row)
        self.parts: list[torch.optim.Optimizer] = []
        if muon_rows:
            self.parts.append(
                torch.optim.Muon(
                    muon_rows, lr=config.muon_lr, momentum=config.momentum, ns_steps=config.newton_schulz_steps
                )
            )
        if adamw_rows:
            self.parts.append(
                torch.optim.AdamW(adamw_rows, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
            )

    def step(self, factor: float) -> None:
        """One update at ``factor`` times the peak learning rates; clears the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """All state as ``"<parameter name>/<state name>" -> tensor``; learning rates are rebuilt from the config."""
        return {
            f"{self.names[id(parameter)]}/{key}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_tensors`. Raises :class:`ResumeError` on names of other parameters."""
        owners = {
            self.names[id(p)]: (part, p) for part in self.parts for group in part.param_groups for p in group["params"]
        }
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition("/")
            if name not in owners:
                raise ResumeError(
                    f"the saved optimiser state has {full_name!r} and the model has no trainable parameter {name!r}; "
                    "resume with the model that wrote the checkpoint."
                )
            part, parameter = owners[name]
            own = tensor.to(parameter.device, copy=True)
            if own.shape == parameter.shape:  # laid out as the parameter is: fused updates go by memory, not by index
                own = torch.empty_like(parameter, dtype=own.dtype).copy_(own)
            part.state[parameter][key] = own


def _check_groups(groups: Sequence[ParameterGroup], names: Mapping[int, str]) -> None:
    seen: dict[int, str] = {}
    for group in groups:
        if group.lr_multiplier <= 0 or group.width_ratio <= 0:
            raise InvalidArgument(
                f"parameter group {group.name!r}: lr_multiplier and width_ratio must be positive, got "
                f"{group.lr_multiplier} and {group.width_ratio}; freeze parameters with requires_grad_(False)."
            )
        for parameter in group.parameters:
            name = names.get(id(parameter), "a parameter that is frozen or not the model's")
            if id(parameter) in seen:
                raise InvalidArgument(
                    f"parameter groups {seen[id(parameter)]!r} and {group.name!r} both hold {name}; "
                    "parameter_groups() must return every trainable parameter once."
                )
            if group.kind == "matrix" and parameter.ndim != 2:
                raise InvalidArgument(
                    f"parameter group {group.name!r} of kind 'matrix' holds {name} of shape {tuple(parameter.shape)}; "
                    "matrices are 2-D, put it in a group of kind 'other'."
                )
            seen[id(parameter)] = group.name
    missing = [name for key, name in names.items() if key not in seen]
    if missing:
        raise InvalidArgument(
            f"parameter_groups() leaves out {len(missing)} trainable parameters: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; every trainable parameter must be in one group."
        )
