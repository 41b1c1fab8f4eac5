"""What keeps long rollouts among real frames: now and then, tokens are decoded and encoded again.

Soft tokens that a rollout makes drift away from those that the tokenizer makes of frames, a little in every step, until
their pictures dissolve. A round trip through the tokenizer brings them back. ``DynamicsConfig.refresh`` says how often;
what it changed in lift-64 is told in docs/experiments.md.
"""

from __future__ import annotations

import dataclasses

import torch

from hma_gym.dynamics.rollout import RolloutState
from hma_gym.tokenizers.protocol import Tokenizer


def refreshed(state: RolloutState, tokenizer: Tokenizer, every: int) -> RolloutState:
    """The state with new tokens in the rows whose step is a multiple of ``every``; the state itself where 0.

    All rows make the round trip when one of them does, so that a row's tokens depend on its own step only.
    """
    if every == 0:
        return state
    due_B = state.step_B % every == 0
    if not bool(due_B.any()):
        return state
    tokens = tokenizer.encode(tokenizer.decode(state.tokens)).to(state.tokens.dtype)
    due = due_B.view(-1, *(1,) * (tokens.ndim - 1))
    return dataclasses.replace(state, tokens=torch.where(due, tokens, state.tokens))
