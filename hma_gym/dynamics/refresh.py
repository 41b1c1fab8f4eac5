"""What keeps long rollouts among real frames: now and then, tokens are decoded and encoded again.

Soft tokens that a rollout makes drift away from those that the tokenizer makes of frames, a little in every step, until
their pictures dissolve. A round trip through the tokenizer brings them back. ``DynamicsConfig.refresh`` says how often;
what it changed in lift-64 is told in docs/experiments.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hma_gym.dynamics.rollout import RolloutState
from hma_gym.tokenizers.protocol import Tokenizer

#: Rows that make the round trip together on a CPU. On a GPU all do, for a few cost as much as all there.
GROUP = 4


def in_groups(
    function: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor], due_R: Sequence[int]
) -> tuple[Tensor, ...]:
    """What a function makes of some rows of a batch.

    It is given the groups of neighbours in which any row is due: so little is done where few are, and what becomes of
    a row does not depend, to the last bit, on which others are due, for its place in its group is always the same.

    Args:
        function: of the given tensors of any number of rows, row by row.
        given: what it is given of all rows, (B, ...) each.
        due_R: which rows, in ascending order, one or more.

    Returns:
        What the function returns, (R, ...) each.
    """
    size = len(given[0]) if given[0].is_cuda else GROUP
    parts = []
    for first, group in itertools.groupby(due_R, key=lambda row: row - row % size):
        places = torch.tensor([row - first for row in group], device=given[0].device)
        made = function(*(x[first : first + size] for x in given))
        parts.append([found.index_select(0, places) for found in made])
    return tuple(torch.cat(found) for found in zip(*parts, strict=True))


def refreshed(state: RolloutState, tokenizer: Tokenizer, every: int) -> RolloutState:
    """The state with new tokens in the rows whose step is a multiple of ``every``; the state itself where 0."""
    if every == 0:
        return state
    due_R = (state.step_B % every == 0).nonzero()[:, 0]
    if not len(due_R):
        return state
    (tokens_R,) = in_groups(lambda x: (tokenizer.encode(tokenizer.decode(x)),), (state.tokens,), due_R.tolist())
    return dataclasses.replace(state, tokens=state.tokens.index_copy(0, due_R, tokens_R.to(state.tokens.dtype)))
