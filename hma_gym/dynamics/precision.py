"""A checkpoint whose networks multiply in bfloat16: faster rollouts, chosen by name and written where it came from.

>>> import gymnasium, hma_gym
>>> from hma_gym.dynamics.checkpoint import load_checkpoint
>>> from hma_gym.dynamics.precision import with_precision
>>> fast = with_precision(load_checkpoint("lift-64"), "bfloat16")
>>> envs = gymnasium.make_vec("HMA-Lift-v0", num_envs=32, checkpoint=fast)
"""

from __future__ import annotations

import dataclasses

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.errors import InvalidArgument
from hma_gym.nn.precision import Precision, in_precision


def with_precision(checkpoint: Checkpoint, precision: Precision) -> Checkpoint:
    """The same checkpoint with its matrix products in a precision; ``provenance["precision"]`` says which.

    ``float32`` shares the networks, ``bfloat16`` copies them. Only products are rounded: the residual stream, norms,
    softmax and the cache stay in float32. It is for rollouts, not for training or saving.

    Raises:
        InvalidArgument: another precision, or a checkpoint that has one already.
    """
    if "precision" in checkpoint.provenance:
        raise InvalidArgument(
            f"checkpoint {checkpoint.name!r} was put into {checkpoint.provenance['precision']!r} before; load it again "
            f"to put it into {precision!r}."
        )
    return dataclasses.replace(
        checkpoint,
        tokenizer=in_precision(checkpoint.tokenizer, precision),
        dynamics=in_precision(checkpoint.dynamics, precision),
        judge=None if checkpoint.judge is None else in_precision(checkpoint.judge, precision),
        feature_judge=None if checkpoint.feature_judge is None else in_precision(checkpoint.feature_judge, precision),
        provenance={**checkpoint.provenance, "precision": precision},
    )
