"""Named models have the geometry and the parameter counts of the paper, without allocating a weight."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from toy_dynamics import domain

from hma_gym.dynamics.mar import FlowHeadConfig
from hma_gym.dynamics.model import Dynamics
from hma_gym.dynamics.sizes import MODELS, TRUNKS, named_model, named_trunk
from hma_gym.errors import UnknownName


def _on_meta(name: str) -> Dynamics:
    with torch.device("meta"):
        return Dynamics(named_model(name), [domain("lift", actions=7, state=0, targets=0)])


def _millions(dynamics: Dynamics, *parts: str) -> float:
    return sum(p.numel() for n, p in dynamics.named_parameters() if not parts or any(x in n for x in parts)) / 1e6


@pytest.mark.parametrize(("name", "paper", "tolerance"), [("base", 44, 0.02), ("xl", 679, 0.02)])
def test_discrete_models_have_the_papers_size(name: str, paper: float, tolerance: float) -> None:
    dynamics = _on_meta(name)
    assert {t.device.type for t in (*dynamics.parameters(), *dynamics.buffers())} == {"meta"}
    assert _millions(dynamics) == pytest.approx(paper, rel=tolerance)


def test_base_splits_into_trunk_and_domain_as_the_paper_does() -> None:
    dynamics = _on_meta("base")
    per_domain = _millions(dynamics, "adapters.", ".mix.")  # the paper keeps the projection after modulation by domain
    assert per_domain == pytest.approx(8.5, rel=0.02)
    assert _millions(dynamics) - per_domain == pytest.approx(35.2, rel=0.02)


@pytest.mark.parametrize(("name", "paper"), [("mar-base", 96), ("mar-xl", 741)])
def test_soft_models_have_the_papers_size(name: str, paper: float) -> None:
    """With both diffusion heads; ours may be smaller."""
    assert _millions(_on_meta(name)) == pytest.approx(paper, rel=0.02)
    config = named_model(name)
    with torch.device("meta"):
        few = dataclasses.replace(config, head=FlowHeadConfig(grid=(32, 32), channels=4))
        small = Dynamics(few, [domain("lift", actions=7, state=0, targets=0)])
    assert _millions(small) < paper - 20 and small.head.positions == 256


def test_base_has_two_diffusion_heads_of_one_size() -> None:
    dynamics = _on_meta("mar-base")
    tokens, actions = _millions(dynamics, "head.flow."), _millions(dynamics, "action_out.")
    assert tokens == pytest.approx(25.5, rel=0.01) and actions == pytest.approx(tokens, rel=0.01)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_geometry(name: str) -> None:
    config = named_model(name)
    trunk = config.trunk
    assert (trunk.layers, trunk.heads, trunk.window) == (32, 8, 12)
    assert trunk.width == (1024 if name.endswith("xl") else 256)
    dynamics = _on_meta(name)
    assert dynamics.head.positions == 256 and dynamics.positions == 256 + 1 + 64


@pytest.mark.parametrize("name", sorted(TRUNKS))
def test_trunks(name: str) -> None:
    assert named_trunk(name).positions == "rotary"


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match="choose one of: lift, shallow, small, toy"):
        named_trunk("huge")
    with pytest.raises(UnknownName, match="base, mar-base, mar-xl, xl"):
        named_model("lift")
