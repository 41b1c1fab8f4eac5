"""Domains: JSON and back, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from toy_dynamics import domain, handling

from hma_gym.domains import Domain
from hma_gym.errors import InvalidDomain


@pytest.mark.parametrize("own", [domain(), handling(), domain(actions=0, state=0, targets=0)])
def test_domains_survive_json(own: Domain) -> None:
    assert Domain.from_dict(json.loads(json.dumps(own.to_dict()))) == own


def test_domains_of_earlier_versions_have_no_object() -> None:
    fields = domain().to_dict()
    del fields["object_turns"], fields["camera_projection"]
    assert Domain.from_dict(fields).object_turns == 0 and Domain.from_dict(fields).camera_projection == ()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"object_turns": -1}, "object_turns must be 0 or more.*object_turns=-1"),
        ({"targets": 3, "object_turns": 1}, "needs targets of 9 dims.*object_turns=1, 3 and 9 dims"),
        ({"state": 6, "object_turns": 4}, "an agent_pos of 7 or more.*object_turns=4, 9 and 6 dims"),
    ],
)
def test_an_object_needs_its_pose_and_a_hand(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidDomain, match=message):
        domain(**{"state": 9, "targets": 9, **shape})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_mean": (0.0,)}, "target_mean must have 9 values, got 1"),
        ({"action_std": (0.5, 0.5, 0.5, 0.0)}, "action_std must be positive"),
        ({"state_mean": (float("nan"),) * 9}, "state_mean must be finite"),
        ({"stride": 0}, "stride >= 1"),
        ({"camera_projection": (1.0,) * 9}, "camera_projection must have 12 values, got 9"),
        ({"camera_projection": (1.0,) * 12, "object_turns": 0}, "object_turns above 0.*object_turns=0"),
    ],
)
def test_statistics_must_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidDomain, match=message):
        dataclasses.replace(handling(), **change)
    with pytest.raises(InvalidDomain, match=r"unknown keys \['colour'\]"):
        Domain.from_dict({**handling().to_dict(), "colour": "red"})
