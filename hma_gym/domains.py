"""A domain is one embodiment: its action and state spaces, statistics, control rate and cameras.

The paper (HMA, arXiv 2502.04296, Section 3.2) gives each domain its own action encoder ("stem") and
decoder ("head") around one shared trunk. This module holds the numbers that these need; it imports
numpy only.

Shape legend: A action dims, P agent_pos (proprioception) dims, X privileged target dims.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import InvalidDomain

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Domain:
    """One embodiment.

    Attributes:
        name: unique key of the domain inside a checkpoint, e.g. ``"lift"``.
        action_dim: A, number of action dims.
        action_low, action_high: bounds of the env's action Box, A values each.
        action_mean, action_std: statistics of the training actions, A values each; std > 0.
        state_dim: P, dims of ``agent_pos``; 0 for a domain without proprioception.
        state_mean, state_std: statistics of ``agent_pos``, P values each.
        delta_std: standard deviation of one step's change of ``agent_pos``, P values; the state head
            predicts the change in these units.
        target_dim: X, dims of the privileged targets (for Lift: cube position, 3 m) that an auxiliary
            head may learn to read from the features. True ones are never an input to a rollout; 0 where the data
            has none.
        target_mean, target_std: their statistics, X values each.
        object_turns: where above 0, the targets are the pose of an object, X = 9: its position (3, m) and the first two
            columns of its rotation matrix (6); and agent_pos begins with a hand's position (3, m) and quaternion (4,
            xyzw) in the same frame of reference. The model then foretells and draws the object too (see
            :mod:`hma_gym.dynamics.body`). The number says in how many positions of a full turn about the upright axis
            the object looks alike: 4 for a cube, 1 for most things.
        camera_projection: how the first camera sees the room, where that is known, else empty; only with an object. The
            12 numbers, row by row, of a 3 x 4 matrix that takes (x, y, z, 1), m, in agent_pos's frame of reference, to
            (u w, v w, w): u to the right and v down, the picture's edges at -1 and 1.
        control_hz: steps per second of the environment.
        stride: environment steps per model step (the action chunk of one frame has ``stride`` actions).
        cameras: camera names, the first is the observation.
        image_size: (height, width) of a frame in pixels.
    """

    name: str
    action_dim: int
    action_low: Vector
    action_high: Vector
    action_mean: Vector
    action_std: Vector
    state_dim: int = 0
    state_mean: Vector = ()
    state_std: Vector = ()
    delta_std: Vector = ()
    target_dim: int = 0
    target_mean: Vector = ()
    target_std: Vector = ()
    object_turns: int = 0
    camera_projection: Vector = ()
    control_hz: float = 20.0
    stride: int = 1
    cameras: tuple[str, ...] = ("agentview",)
    image_size: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        for name, size in (
            ("action_low", self.action_dim),
            ("action_high", self.action_dim),
            ("action_mean", self.action_dim),
            ("action_std", self.action_dim),
            ("state_mean", self.state_dim),
            ("state_std", self.state_dim),
            ("delta_std", self.state_dim),
            ("target_mean", self.target_dim),
            ("target_std", self.target_dim),
            ("camera_projection", 12 if self.camera_projection else 0),
        ):
            value = tuple(float(v) for v in getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != size:
                raise InvalidDomain(
                    f"domain {self.name!r}: {name} must have {size} values, got {len(value)}; "
                    "recompute the statistics from the dataset that the domain describes."
                )
            if not all(math.isfinite(v) for v in value):
                raise InvalidDomain(f"domain {self.name!r}: {name} must be finite, got {value}.")
            if name.endswith("_std") and any(v <= 0 for v in value):
                raise InvalidDomain(
                    f"domain {self.name!r}: {name} must be positive, got {value}; "
                    "Domain.from_statistics puts a floor under dims that never move."
                )
        if self.action_dim < 0 or self.stride < 1 or self.control_hz <= 0:
            raise InvalidDomain(
                f"domain {self.name!r}: needs action_dim >= 0, stride >= 1 and control_hz > 0, got "
                f"action_dim={self.action_dim}, stride={self.stride}, control_hz={self.control_hz}."
            )
        if self.object_turns < 0 or (self.object_turns and (self.target_dim != 9 or self.state_dim < 7)):
            raise InvalidDomain(
                f"domain {self.name!r}: object_turns must be 0 or more, and above 0 needs targets of 9 dims (an "
                "object's pose) and an agent_pos of 7 or more (a hand's pose first), got "
                f"object_turns={self.object_turns}, "
                f"{self.target_dim} and {self.state_dim} dims."
            )
        if self.camera_projection and not self.object_turns:
            raise InvalidDomain(
                f"domain {self.name!r}: camera_projection is for a hand and an object whose poses are known "
                "(object_turns above 0), got object_turns=0; leave it empty."
            )
        object.__setattr__(self, "cameras", tuple(self.cameras))
        object.__setattr__(self, "image_size", (int(self.image_size[0]), int(self.image_size[1])))

    @classmethod
    def from_statistics(
        cls,
        name: str,
        *,
        actions_FA: NDArray[np.floating[Any]],
        agent_pos_FP: NDArray[np.floating[Any]] | None = None,
        deltas_FP: NDArray[np.floating[Any]] | None = None,
        targets_FX: NDArray[np.floating[Any]] | None = None,
        action_low: Vector | None = None,
        action_high: Vector | None = None,
        **fields: Any,
    ) -> Domain:
        """Compute a domain's statistics from flat arrays over all training frames F.

        ``deltas_FP`` are one-step changes of agent_pos inside episodes. A standard deviation below 1e-4
        (a dim that never moves) is replaced by 1.0 for values and by 1e-3 for changes.
        """

        def stats(x: NDArray[Any] | None, floor: float) -> tuple[Vector, Vector]:
            if x is None:
                return (), ()
            mean = x.mean(axis=0, dtype=np.float64)
            std = x.std(axis=0, dtype=np.float64)
            return tuple(mean.tolist()), tuple(np.where(std < 1e-4, floor, std).tolist())

        action_dim = actions_FA.shape[1]
        action_mean, action_std = stats(actions_FA, 1.0)
        state_mean, state_std = stats(agent_pos_FP, 1.0)
        _, delta_std = stats(deltas_FP, 1e-3)
        target_mean, target_std = stats(targets_FX, 1.0)
        return cls(
            name=name,
            action_dim=action_dim,
            action_low=action_low if action_low is not None else (-1.0,) * action_dim,
            action_high=action_high if action_high is not None else (1.0,) * action_dim,
            action_mean=action_mean,
            action_std=action_std,
            state_dim=len(state_mean),
            state_mean=state_mean,
            state_std=state_std,
            delta_std=delta_std,
            target_dim=len(target_mean),
            target_mean=target_mean,
            target_std=target_std,
            **fields,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, read back by :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Domain:
        """The inverse of :meth:`to_dict`; unknown keys raise :class:`InvalidDomain`."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise InvalidDomain(
                f"domain: unknown keys {unknown}; this version of hma_gym knows {sorted(known)}. "
                "A newer version may have written it: upgrade hma_gym."
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)
