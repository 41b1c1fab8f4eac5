"""The optimiser's groups, the learning-rate schedules and the mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_toy import Toy

from hma_gym.errors import InvalidArgument
from hma_gym.nn.parameters import ParameterGroup, default_parameter_groups
from hma_gym.training import Mixture, Optimizer, OptimizerConfig, learning_rate_factor, mixture_probabilities


def test_default_groups_sort_parameters_by_role() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(3, 4),
            "hidden": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "convolution": nn.Conv2d(1, 1, 3),
            "head": nn.Linear(4, 2),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    groups = {g.name: g for g in default_parameter_groups(model, not_matrices=[model["head"].weight])}
    names = {id(p): name for name, p in model.named_parameters()}
    members = {name: sorted(names[id(p)] for p in group.parameters) for name, group in groups.items()}
    assert members == {
        "matrix": ["hidden.weight"],
        "decayed": ["convolution.weight", "head.weight"],
        "plain": ["convolution.bias", "embedding.weight", "head.bias", "hidden.bias", "norm.bias", "norm.weight"],
    }
    assert groups["plain"].weight_decay_multiplier == 0
    Optimizer(model, list(groups.values()), OptimizerConfig(name="muon"))


@pytest.mark.parametrize(
    ("groups_of", "message"),
    [
        (lambda m: [ParameterGroup("a", [m.weight])], "leaves out 1 trainable parameters: bias"),
        (
            lambda m: [ParameterGroup("a", [m.weight, m.bias]), ParameterGroup("b", [m.bias])],
            "groups 'a' and 'b' both hold bias",
        ),
        (lambda m: [ParameterGroup("a", [m.weight, m.bias], kind="matrix")], r"holds bias of shape \(2,\)"),
        (lambda m: [ParameterGroup("a", [m.weight, m.bias], lr_multiplier=0.0)], "requires_grad_"),
    ],
)
def test_groups_that_break_a_rule(groups_of: Callable[[nn.Linear], list[ParameterGroup]], message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(InvalidArgument, match=message):
        Optimizer(model, groups_of(model), OptimizerConfig())


def updates(name: str, width_ratio: float, lr_multiplier: float = 1.0) -> torch.Tensor:
    """The change that one step at half the peak rates makes to a matrix."""
    model = nn.Linear(8, 8, bias=False)
    group = ParameterGroup("w", [model.weight], lr_multiplier=lr_multiplier, kind="matrix", width_ratio=width_ratio)
    config = OptimizerConfig(name="muon" if name == "muon" else "adamw", lr=0.1, muon_lr=0.2, weight_decay=0.0)
    optimizer = Optimizer(model, [group], config)
    before = model.weight.detach().clone()
    model.weight.grad = torch.eye(8)
    optimizer.step(0.5)
    return model.weight.detach() - before


def test_multipliers_scale_updates() -> None:
    torch.testing.assert_close(updates("adamw", 1.0).diagonal(), torch.full((8,), -0.05))
    torch.testing.assert_close(updates("adamw", 4.0).diagonal(), torch.full((8,), -0.0125))
    torch.testing.assert_close(updates("adamw", 1.0, lr_multiplier=3.0).diagonal(), torch.full((8,), -0.15))
    plain = updates("muon", 1.0)
    assert torch.linalg.matrix_norm(plain, 2).item() == pytest.approx(0.1, rel=0.5)
    torch.testing.assert_close(updates("muon", 4.0), plain)
    torch.testing.assert_close(updates("muon", 1.0, lr_multiplier=3.0), 3 * plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "optimizer.name must be 'adamw' or 'muon', got 'sgd'"),
        ({"lr": 0.0}, "optimizer.lr must be positive, got 0.0"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps must be 1 or more, got 0"),
        ({"weight_decay": -1.0}, "optimizer.weight_decay must be 0 or more, got -1.0"),
    ],
)
def test_optimiser_configurations_that_break_a_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        OptimizerConfig(**changes)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("width_ratio", [1.0, 8.0])
def test_weight_decay_is_the_same_for_every_width_and_optimiser(name: str, width_ratio: float) -> None:
    model = nn.Linear(4, 4, bias=False)
    group = ParameterGroup("w", [model.weight], kind="matrix", width_ratio=width_ratio)
    config = OptimizerConfig(name="muon" if name == "muon" else "adamw", lr=0.1, weight_decay=0.5)
    optimizer = Optimizer(model, [group], config)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros(4, 4)
    optimizer.step(0.5)
    torch.testing.assert_close(model.weight.detach(), before * (1 - 0.5 * 0.1 * 0.5))


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    model = Toy()
    parts = Optimizer(model, model.parameter_groups(), OptimizerConfig(name="muon")).parts
    assert [type(part) for part in parts] == [torch.optim.Muon, torch.optim.AdamW]
    assert [p.shape for group in parts[0].param_groups for p in group["params"]] == [(16, 4)]


@pytest.mark.parametrize(
    ("decay", "values"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [1.0, 0.1 + 0.9 * (0.5 + math.sqrt(0.125)), 0.55, 0.1 + 0.9 * (0.5 - math.sqrt(0.125)), 0.1]),
        ("wsd", [1.0, 1.0, 1.0, 0.55, 0.1]),
    ],
)
def test_schedule_values(decay: str, values: list[float]) -> None:
    at = [
        learning_rate_factor(99, p, warmup_steps=10, decay=decay, decay_fraction=0.5, final=0.1)  # type: ignore[arg-type]
        for p in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert at == pytest.approx(values)


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    factors = [learning_rate_factor(step, 0.0, warmup_steps=4, decay="wsd") for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate_factor(0, 0.0, warmup_steps=0, decay="wsd", decay_fraction=0.0) == 1.0


SIZES = {"large": 8000, "middle": 1000, "small": 1}


def test_mixture_probabilities_are_the_papers() -> None:
    assert mixture_probabilities(SIZES) == pytest.approx({"large": 20 / 31, "middle": 10 / 31, "small": 1 / 31})
    assert mixture_probabilities(SIZES, 1.0)["large"] == pytest.approx(8000 / 9001)
    assert mixture_probabilities(SIZES, math.inf) == pytest.approx(dict.fromkeys(SIZES, 1 / 3))
    for bad in ({}, {"a": 0}):
        with pytest.raises(InvalidArgument, match="sizes must name"):
            mixture_probabilities(bad)
    with pytest.raises(InvalidArgument, match="temperature must be positive, got 0"):
        mixture_probabilities(SIZES, 0)


def test_mixture_rows_follow_the_probabilities_and_repeat() -> None:
    mixture = Mixture(SIZES, seed=3)
    expected = 8 * np.array(list(mixture.probabilities.values()))
    total = np.zeros(3)
    for step in range(2000):
        rows = mixture.rows(step, 8)
        counts = np.bincount(rows, minlength=3)
        assert (np.diff(rows) >= 0).all() and len(rows) == 8
        assert (np.abs(counts - expected) < 1).all()
        total += counts
    np.testing.assert_allclose(total / total.sum(), expected / 8, atol=0.005)
    assert (mixture.rows(7, 8) == Mixture(SIZES, seed=3).rows(7, 8)).all()
    assert any((mixture.rows(s, 8) != Mixture(SIZES, seed=4).rows(s, 8)).any() for s in range(20))
    assert mixture.counts(0, 8) == dict(zip(SIZES, np.bincount(mixture.rows(0, 8), minlength=3), strict=True))


def test_what_is_saved_of_an_optimiser_takes_the_layout_of_its_parameter() -> None:
    """Saved states are contiguous; parameters of convolutions may be laid out channels last."""

    def trained(*, resumed: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups, config = [ParameterGroup("all", list(model.parameters()))], OptimizerConfig(lr=0.1)
        optimizer = Optimizer(model, groups, config)
        for step in range(6):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step(1.0)
            if resumed and step == 2:
                saved = {name: tensor.clone().contiguous() for name, tensor in optimizer.state_tensors().items()}
                optimizer = Optimizer(model, groups, config)
                optimizer.load_state_tensors(saved)
        return model.weight.detach()

    assert torch.equal(trained(resumed=True), trained(resumed=False))
