"""bfloat16 is chosen, reported, near float32, and leaves the checkpoint that it was made from alone."""

from __future__ import annotations

import pytest
import torch

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.dynamics.precision import with_precision
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import InvalidArgument
from hma_gym.nn.precision import LowConv2d, LowLinear


def test_bfloat16_is_reported_and_shows_nearly_the_same_frames(toy: Checkpoint) -> None:
    fast = with_precision(toy, "bfloat16")
    assert fast.provenance["precision"] == "bfloat16" and "precision" not in toy.provenance
    kinds = {type(module) for part in (fast.dynamics, fast.tokenizer) for module in part.modules()}
    assert {LowLinear, LowConv2d} <= kinds
    assert all(p.dtype == torch.float32 for p in toy.dynamics.parameters())
    frames = []
    for checkpoint in (toy, fast):
        envs = HMAVectorEnv(2, checkpoint=checkpoint, output="torch")
        envs.reset(seed=0)
        envs.action_space.seed(0)
        frames.append(torch.stack([envs.step(envs.action_space.sample())[0] for _ in range(5)]).float())
    difference = (frames[0] - frames[1]).abs()
    assert 0 < float(difference[0].max()) and float(difference[0].mean()) < 1.0
    moved = (frames[0][1:] - frames[0][:-1]).abs().mean()  # random weights let a rollout stray from its first frame on
    assert float(difference.mean()) < 0.2 * float(moved)


def test_float32_shares_the_networks(toy: Checkpoint) -> None:
    same = with_precision(toy, "float32")
    assert same.dynamics is toy.dynamics and same.tokenizer is toy.tokenizer
    assert same.provenance["precision"] == "float32"


def test_a_precision_is_chosen_once_and_by_name(toy: Checkpoint) -> None:
    with pytest.raises(InvalidArgument, match="'float32' or 'bfloat16', got 'int4'"):
        with_precision(toy, "int4")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="put into 'bfloat16' before"):
        with_precision(with_precision(toy, "bfloat16"), "float32")
