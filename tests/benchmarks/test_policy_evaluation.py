"""The roster of the policy benchmark: its stages, its held-out policies, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hma_gym.benchmarks.policy_evaluation import PolicyEvaluationConfig, roster
from hma_gym.errors import InvalidArgument


def test_the_roster_takes_its_policies_from_where_training_keeps_them() -> None:
    entries = roster(PolicyEvaluationConfig(work=Path("w"), diffusion_steps=(2, 4, 8), robomimic_epochs=16))
    specs = {entry.label: entry.spec for entry in entries}
    assert len(specs) == len(entries) == 13
    assert specs["diffusion-4"] == "w/diffusion/step-0000004"
    assert specs["diffusion-few-demos"] == "w/diffusion_few/step-0000004"
    assert specs["bc"] == "w/bc/epoch_0016.pth"
    assert specs["bc-rnn-early"] == "w/bc_rnn/epoch_0002.pth"
    assert specs["sighted-0.7"] == "sighted:expert:0.7:w/diffusion/step-0000008"
    assert [entry.label for entry in entries if entry.held_out] == ["diffusion-4", "bc-rnn", "sighted-0.85"]


@pytest.mark.parametrize("steps", [(4,), (4, 2), (4, 6), (4, 4), (0, 4)])
def test_stages_that_one_run_cannot_keep_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match="ascending multiples of the first, got"):
        PolicyEvaluationConfig(diffusion_steps=steps)


def test_epochs_without_an_eighth_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="robomimic_epochs must be a multiple of 8, got 12"):
        PolicyEvaluationConfig(robomimic_epochs=12)
