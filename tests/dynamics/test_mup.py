"""muP: what a few steps of training do to the activations does not depend on the width (the coordinate check).

Source: Yang et al. 2022 (arXiv 2203.03466), Table 8 and Appendix D.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toy_dynamics import HEADS, batch, domain

from hma_gym.dynamics.model import Dynamics, DynamicsConfig, ModulationBank
from hma_gym.nn.parameters import ParameterGroup
from hma_gym.nn.transformer import BASE_WIDTH, TrunkConfig
from hma_gym.training import Optimizer, OptimizerConfig

WIDTHS = (64, 128, 256, 512)
STEPS = 4

Groups = Callable[[Dynamics], list[ParameterGroup]]


def _mup(dynamics: Dynamics) -> list[ParameterGroup]:
    return dynamics.parameter_groups()


def _standard(dynamics: Dynamics) -> list[ParameterGroup]:
    """One learning rate for all weights at all widths."""
    return [dataclasses.replace(group, width_ratio=1.0) for group in dynamics.parameter_groups()]


def _model(kind: str, width: int, modulation: str) -> Dynamics:
    torch.manual_seed(0)
    trunk = TrunkConfig(layers=2, width=width, heads=4, window=4, modulation=modulation)  # type: ignore[arg-type]
    dynamics = Dynamics(DynamicsConfig(trunk, HEADS[kind], action_mask=0.3), (domain(),))
    dynamics.freeze_bodies()  # they have no width to share
    return dynamics


def _watched(dynamics: Dynamics) -> dict[str, nn.Module]:
    """Every layer that reads or writes the trunk's width."""
    return {
        name: module
        for name, module in dynamics.named_modules()
        if isinstance(module, nn.Linear | ModulationBank)
        and not name.startswith("head.flow.layers")
        and ".body." not in name
    }


def _activations(kind: str, width: int, modulation: str, groups: Groups) -> tuple[dict[str, float], dict[str, float]]:
    """Root mean square of each layer's output after training, and of its change from the start of it."""
    dynamics = _model(kind, width, modulation)
    clip = batch(kind, dynamics, 16, 3)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    handles = [
        module.register_forward_hook(lambda _m, _i, y, name=name: seen[name].append(y.detach()))
        for name, module in _watched(dynamics).items()
    ]
    optimizer = Optimizer(dynamics, groups(dynamics), OptimizerConfig(lr=3e-3, weight_decay=0.0))
    for _ in range(STEPS):
        loss, _ = dynamics.loss(clip, torch.Generator().manual_seed(0))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(1.0)
    with torch.no_grad():
        dynamics.loss(clip, torch.Generator().manual_seed(0))
    for handle in handles:
        handle.remove()
    size = {name: float(ys[-1].square().mean().sqrt()) for name, ys in seen.items()}
    change = {name: float((ys[-1] - ys[0]).square().mean().sqrt()) for name, ys in seen.items()}
    return size, change


def _slopes(kind: str, modulation: str, groups: Groups) -> tuple[dict[str, float], dict[str, float]]:
    """Exponents of the width in the size and in the change of each layer's output, by least squares."""
    measured = [_activations(kind, width, modulation, groups) for width in WIDTHS]
    x = torch.tensor([math.log(width) for width in WIDTHS])
    x = x - x.mean()

    def slope(values: list[float]) -> float:
        return float((x * torch.tensor(values).clamp(min=1e-9).log()).sum() / (x * x).sum())

    size, change = (
        {name: slope([m[which][name] for m in measured]) for name in measured[0][which]} for which in (0, 1)
    )
    return size, change


@pytest.mark.parametrize(("kind", "modulation"), [("soft", "adaln"), ("vq", "residual")])
def test_coordinate_check(kind: str, modulation: str) -> None:
    size, change = _slopes(kind, modulation, _mup)
    for slopes in (size, change):
        in_trunk = {name: slope for name, slope in slopes.items() if name.startswith("trunk.")}
        assert len(in_trunk) >= 12 and max(map(abs, in_trunk.values())) < 0.25, in_trunk
        assert max(map(abs, slopes.values())) < 0.55, slopes
    readout = "head.mean_out" if kind == "soft" else "head.logits_out"
    assert abs(change[readout]) < 0.2
    _, standard = _slopes(kind, modulation, _standard)
    for name in (readout, "trunk.blocks.0.spatial.out", "trunk.blocks.1.down"):
        assert standard[name] > 0.4, (name, standard[name])


@pytest.mark.parametrize("width", [64, 256, 512])
@pytest.mark.parametrize(("kind", "modulation"), [("soft", "adaln"), ("vq", "residual")])
def test_groups_know_which_weights_grow_with_the_width(kind: str, modulation: str, width: int) -> None:
    """Against Table 8, read off the shapes: AdamW's rate falls where the fan-in is the width or a multiple of it."""
    dynamics, double = (_model(kind, w, modulation) for w in (width, 2 * width))
    names = {id(p): name for name, p in dynamics.named_parameters() if p.requires_grad}
    wider = dict(double.named_parameters())
    groups = dynamics.parameter_groups()
    assert sorted(names[id(p)] for group in groups for p in group.parameters) == sorted(names.values())
    for group in groups:
        for parameter in group.parameters:
            name = names[id(parameter)]
            if parameter.ndim < 2 or "embedding" in name or "bias" in name or ".tables." in name:
                fan_in_grows = False
            elif name.endswith(("modulation.out", "modulation.hidden")):
                fan_in_grows = True
            else:
                fan_in_grows = wider[name].shape[1] > parameter.shape[1]
            assert group.width_ratio == (width / BASE_WIDTH if fan_in_grows else 1.0), name


@pytest.mark.parametrize("kind", ["soft", "vq"])
def test_muon_gets_square_hidden_matrices_only(kind: str) -> None:
    dynamics = _model(kind, 64, "residual")
    names = {id(p): name for name, p in dynamics.named_parameters() if p.requires_grad}
    matrices = [p for group in dynamics.parameter_groups() if group.kind == "matrix" for p in group.parameters]
    assert all(p.ndim == 2 and names[id(p)].startswith("trunk.blocks.") for p in matrices)
    assert len(matrices) == 2 * 7  # two blocks of qkv and out (space, time), up, down, mix


def test_attention_is_scaled_by_the_head_dim() -> None:
    """1/K, not 1/sqrt(K); equal to the classical scale at the base head dim of 32."""
    scales = {width: _model("soft", width, "adaln").trunk.blocks[0].scale for width in (64, 128, 256)}
    assert scales[128] == pytest.approx(32**-0.5)
    assert scales[64] / scales[256] == pytest.approx(4.0)
