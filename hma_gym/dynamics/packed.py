"""A checkpoint whose linear layers are packed for the CPU: faster rollouts, by choice.

>>> from hma_gym.dynamics.checkpoint import load_checkpoint
>>> from hma_gym.dynamics.packed import with_packed_weights
>>> fast = with_packed_weights(load_checkpoint("lift-64"), num_envs=1)  # doctest: +SKIP
>>> env = gymnasium.make("HMA-Lift-v0", checkpoint=fast)  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.errors import InvalidArgument
from hma_gym.nn.packed import packed


def with_packed_weights(checkpoint: Checkpoint, num_envs: int) -> Checkpoint:
    """The same checkpoint with its dynamics model's linear layers packed; ``provenance["packed"]`` says so.

    It is for rollouts, not for training or saving. Precision first, then this, then compilation.

    Args:
        num_envs: for which it shall be fastest; any number works.

    Raises:
        InvalidArgument: weights that are not on a CPU, or a checkpoint that was packed or compiled before.
    """
    if "packed" in checkpoint.provenance:
        raise InvalidArgument(f"checkpoint {checkpoint.name!r} has packed weights already; use it as it is.")
    if "compiled" in checkpoint.provenance:
        raise InvalidArgument(
            f"checkpoint {checkpoint.name!r} is compiled, and its weights must be packed before; use it as it is, or "
            "pack the checkpoint that it was compiled from."
        )
    return dataclasses.replace(
        checkpoint,
        dynamics=packed(checkpoint.dynamics, num_envs * checkpoint.dynamics.positions),
        provenance={**checkpoint.provenance, "packed": True},
    )
