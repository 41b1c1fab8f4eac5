"""A checkpoint whose networks multiply in bfloat16 or in 8-bit integers: faster rollouts, chosen by name and written
where it came from.

>>> import gymnasium, hma_gym
>>> from hma_gym.dynamics.checkpoint import load_checkpoint
>>> from hma_gym.dynamics.precision import with_precision
>>> fast = with_precision(load_checkpoint("lift-64"), "bfloat16")
>>> envs = gymnasium.make_vec("HMA-Lift-v0", num_envs=32, checkpoint=fast)
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from torch import nn

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.errors import InvalidArgument
from hma_gym.nn.int8 import check_int8, in_int8, input_ranges
from hma_gym.nn.precision import Precision, in_precision

RolloutPrecision = Literal[Precision, "int8"]

#: Rollouts, and frames of each, that say what integers must hold.
SEEN_ROLLOUTS, SEEN_FRAMES = 32, 24


def with_precision(checkpoint: Checkpoint, precision: RolloutPrecision) -> Checkpoint:
    """The same checkpoint with its matrix products in a precision; ``provenance["precision"]`` says which.

    ``float32`` shares the networks, the others copy them. Only products are rounded: the residual stream, norms,
    softmax and the cache stay in float32. It is for rollouts, not for training or saving.

    ``int8`` is for batches of rollouts on a CPU (see :mod:`hma_gym.nn.int8`). What its integers must hold it finds out
    by itself, in some seconds: in rollouts of the checkpoint in float32, from its starts, under random actions like
    those that it was trained on. It is the products that serve several tokens or pixels of a frame that become those of
    integers; others, among them all that say where robot and object will be, stay in float32.

    Raises:
        InvalidArgument: another precision, a checkpoint that has one already, or was packed or compiled, or ``int8``
            on a machine without fast products of integers.
    """
    if precision not in get_args(RolloutPrecision):
        choices = ", ".join(repr(name) for name in get_args(RolloutPrecision))
        raise InvalidArgument(f"precision must be one of {choices}, got {precision!r}.")
    if "precision" in checkpoint.provenance:
        raise InvalidArgument(
            f"checkpoint {checkpoint.name!r} was put into {checkpoint.provenance['precision']!r} before; load it again "
            f"to put it into {precision!r}."
        )
    for done in ("packed", "compiled"):
        if done in checkpoint.provenance:
            raise InvalidArgument(
                f"checkpoint {checkpoint.name!r} is {done} already, and its precision must be chosen before: load it "
                f"again and put it into {precision!r} first."
            )
    if precision == "int8":
        return _in_int8(checkpoint)
    return dataclasses.replace(
        checkpoint,
        tokenizer=in_precision(checkpoint.tokenizer, precision),
        dynamics=in_precision(checkpoint.dynamics, precision),
        judge=None if checkpoint.judge is None else in_precision(checkpoint.judge, precision),
        feature_judge=None if checkpoint.feature_judge is None else in_precision(checkpoint.feature_judge, precision),
        provenance={**checkpoint.provenance, "precision": precision},
    )


def _in_int8(checkpoint: Checkpoint) -> Checkpoint:
    tokenizer, dynamics, judge = checkpoint.tokenizer, checkpoint.dynamics, checkpoint.judge
    check_int8(dynamics)  # before the rollouts
    with input_ranges(tokenizer) as read, input_ranges(dynamics) as stepped, input_ranges(judge or nn.Module()) as saw:
        for index in range(len(dynamics.domains)):
            _roll_out(checkpoint, index)
    rows = 2 * SEEN_ROLLOUTS  # there is little work where each rollout has but one or two
    return dataclasses.replace(
        checkpoint,
        tokenizer=in_int8(tokenizer, read, rows),
        dynamics=in_int8(dynamics, stepped, rows),
        judge=None if judge is None else in_int8(judge, saw, rows),
        provenance={**checkpoint.provenance, "precision": "int8"},
    )


@torch.inference_mode()
def _roll_out(checkpoint: Checkpoint, index: int) -> None:
    """Some rollouts of a domain, decoded, judged and encoded again."""
    tokenizer, dynamics, judge = checkpoint.tokenizer, checkpoint.dynamics, checkpoint.judge
    domain, starts = dynamics.domains[index], checkpoint.starts.of_domain(index)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.arange(SEEN_ROLLOUTS) * max(len(starts) // SEEN_ROLLOUTS, 1) % len(starts)
    frames = torch.from_numpy(starts.frames_NHWC)[chosen]
    agent_pos = torch.zeros(SEEN_ROLLOUTS, dynamics.state_size)
    agent_pos[:, : domain.state_dim] = torch.from_numpy(starts.agent_pos_NP)[chosen, : domain.state_dim]
    state = dynamics.start(
        tokenizer.encode(frames), agent_pos, torch.arange(SEEN_ROLLOUTS), torch.full((SEEN_ROLLOUTS,), index)
    )
    mean, std, low, high = (
        torch.tensor(numbers * domain.stride)
        for numbers in (domain.action_mean, domain.action_std, domain.action_low, domain.action_high)
    )
    for _ in range(SEEN_FRAMES):
        actions = mean + std * torch.randn(SEEN_ROLLOUTS, len(mean), generator=generator)
        padded = torch.zeros(SEEN_ROLLOUTS, dynamics.action_size)
        padded[:, : len(mean)] = torch.clamp(actions, low, high)
        state, out = dynamics.step(state, padded, in_place=True)
        frames = tokenizer.decode(out.tokens)
        tokenizer.encode(frames)
        if judge is not None:
            judge.code(frames, state.agent_pos_BP[:, : judge.state_dim] if judge.state_dim else None)
