"""The schedule of unmasking, the masks of training, and the order in which tokens are shown."""

from __future__ import annotations

import math

import pytest
import torch

from hma_gym.dynamics.masking import masked_after, training_mask, unmask


@pytest.mark.parametrize("positions", [1, 2, 16, 64, 256])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16])
def test_schedule_falls_to_zero_and_shows_something_at_every_step(positions: int, steps: int) -> None:
    left = [positions] + [masked_after(step, steps, positions) for step in range(steps)]
    assert left[-1] == 0
    assert all(b < a or a == 0 for a, b in zip(left, left[1:], strict=False))
    assert all(b > 0 for b in left[1 : min(steps, positions)])  # nothing is shown sooner than it must be


def test_schedule_is_the_cosine() -> None:
    assert masked_after(0, 2, 256) == math.floor(256 * math.cos(math.pi / 4))
    assert [masked_after(step, 4, 100) for step in range(4)] == [92, 70, 38, 0]


def test_training_mask_ratios() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = training_mask(400, 5, 16, full_probability=0.3, minimum_ratio=0.5, generator=generator)
    ratio = mask.float().mean(dim=-1)
    assert mask.shape == (400, 5, 16) and float(ratio.min()) == 0.5
    # 0.3 by choice, and of the others those with cos(pi u / 2) > 15 / 16
    full = 0.3 + 0.7 * 2 / math.pi * math.acos(15 / 16)
    assert abs(float((ratio == 1).float().mean()) - full) < 0.03
    half = 0.7 * (1 - 2 / math.pi * math.acos(0.5))
    assert abs(float((ratio == 0.5).float().mean()) - half) < 0.03
    assert abs(float(mask.float().mean(dim=(0, 1)).std())) < 0.02  # no position is preferred
    one = training_mask(50, 4, 16, 0.0, 0.0, generator)
    assert (one.sum(dim=-1) >= 1).all() and not one.all()
    assert training_mask(50, 4, 16, 1.0, 0.0, generator).all()


def test_unmask_shows_the_highest_priority_and_keeps_what_is_shown() -> None:
    masked = torch.tensor([[True, True, False, True, True]])
    priority = torch.tensor([[0.1, 0.9, 5.0, 0.5, -3.0]])
    assert unmask(masked, priority, 2).tolist() == [[True, False, False, False, True]]
    assert unmask(masked, priority, 0).any().item() is False
    assert torch.equal(unmask(masked, priority, 4), masked)


def test_unmask_counts_exactly_also_with_ties_and_row_by_row() -> None:
    masked = torch.ones(3, 8, dtype=torch.bool)
    priority = torch.tensor([[0.0] * 8, [1.0, 0.0] * 4, [float("-inf")] * 8])
    after = unmask(masked, priority, 3)
    assert after.sum(dim=-1).tolist() == [3, 3, 3]
    for row in range(3):
        assert torch.equal(unmask(masked[row : row + 1], priority[row : row + 1], 3)[0], after[row])
