"""bfloat16 and int8 are chosen, reported, near float32, and leave the checkpoint that they were made from alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.dynamics.packed import with_packed_weights
from hma_gym.dynamics.precision import RolloutPrecision, with_precision
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import InvalidArgument
from hma_gym.nn.int8 import Int8Conv2d, Int8Linear
from hma_gym.nn.precision import LowConv2d, LowLinear

LOWER: list[tuple[RolloutPrecision, set[type[nn.Module]], float, float]] = [
    ("bfloat16", {LowLinear, LowConv2d}, 1.0, 0.2),
    ("int8", {Int8Linear, Int8Conv2d}, 4.0, 0.4),
]


@pytest.mark.parametrize(
    ("precision", "layers", "near", "share"),
    [pytest.param(*case, marks=pytest.mark.int8 if case[0] == "int8" else ()) for case in LOWER],
)
def test_a_lower_precision_is_reported_and_shows_nearly_the_same_frames(
    toy: Checkpoint, precision: RolloutPrecision, layers: set[type[nn.Module]], near: float, share: float
) -> None:
    fast = with_precision(toy, precision)
    assert fast.provenance["precision"] == precision and "precision" not in toy.provenance
    kinds = {type(module) for part in (fast.dynamics, fast.tokenizer) for module in part.modules()}
    assert layers <= kinds
    assert all(p.dtype == torch.float32 for p in toy.dynamics.parameters())
    frames = []
    for checkpoint in (toy, fast):
        envs = HMAVectorEnv(2, checkpoint=checkpoint, output="torch")
        envs.reset(seed=0)
        envs.action_space.seed(0)
        frames.append(torch.stack([envs.step(envs.action_space.sample())[0] for _ in range(5)]).float())
    difference = (frames[0] - frames[1]).abs()
    assert 0 < float(difference[0].max()) and float(difference[0].mean()) < near
    moved = (frames[0][1:] - frames[0][:-1]).abs().mean()  # random weights let a rollout stray from its first frame on
    assert float(difference.mean()) < share * float(moved)


@pytest.mark.int8
def test_lift_in_integers_is_lift() -> None:
    lift, shown = load_checkpoint("lift-64"), []
    for checkpoint in (lift, with_precision(lift, "int8")):
        envs = HMAVectorEnv(4, "lift", checkpoint, output="torch")
        envs.reset(seed=0)
        envs.action_space.seed(0)
        shown.append(torch.stack([envs.step(envs.action_space.sample())[0] for _ in range(8)]).float() / 255)
    decibel = -10 * (shown[0] - shown[1]).square().mean(dim=(2, 3, 4)).log10()
    assert float(decibel.min()) > 42.0


@pytest.mark.int8
def test_integers_leave_the_random_numbers_and_the_judge_of_the_bodies_alone(toy: Checkpoint) -> None:
    before = torch.get_rng_state()
    fast = with_precision(toy, "int8")
    assert torch.equal(torch.get_rng_state(), before)
    bodies = [m for name, m in fast.dynamics.named_modules() if ".coast." in name or ".sight." in name]
    assert bodies and not any(isinstance(m, Int8Linear) for m in bodies)
    assert not any(m._forward_pre_hooks for part in (toy.dynamics, toy.tokenizer) for m in part.modules())


@pytest.mark.int8
def test_a_rollout_in_integers_does_not_depend_on_those_beside_it(toy: Checkpoint) -> None:
    fast, shown = with_precision(toy, "int8"), []
    for other in (-1.0, 1.0):
        envs = HMAVectorEnv(3, checkpoint=fast, output="torch")
        envs.reset(seed=0)
        actions = torch.full((3, *envs.single_action_space.shape), other)  # type: ignore[misc]
        actions[1] = 0.5
        shown.append(torch.stack([envs.step(actions)[0] for _ in range(4)]))
    assert torch.equal(shown[0][:, 1], shown[1][:, 1]) and not torch.equal(shown[0][:, 0], shown[1][:, 0])


def test_float32_shares_the_networks(toy: Checkpoint) -> None:
    same = with_precision(toy, "float32")
    assert same.dynamics is toy.dynamics and same.tokenizer is toy.tokenizer
    assert same.provenance["precision"] == "float32"


def test_a_precision_is_chosen_once_and_by_name(toy: Checkpoint) -> None:
    with pytest.raises(InvalidArgument, match="'float32', 'bfloat16', 'int8', got 'int4'"):
        with_precision(toy, "int4")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="is packed already, and its precision must be chosen before"):
        with_precision(with_packed_weights(toy, num_envs=1), "bfloat16")
    with pytest.raises(InvalidArgument, match="put into 'bfloat16' before"):
        with_precision(with_precision(toy, "bfloat16"), "float32")
