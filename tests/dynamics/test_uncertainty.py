"""How sure a rollout is: the score finds where errors are large, is calibrated, knows strangers, and is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hma_gym.dynamics.uncertainty import Uncertainty, UncertaintyConfig, auroc, fit_uncertainty, token_error
from hma_gym.errors import CheckpointError, InvalidArgument

F = 12


def rollouts(episodes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Errors that grow with the steps and with one feature; the other features mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(episodes, 20, F, generator=generator)
    dreamt = torch.arange(1, 21).expand(episodes, 20)
    noise = 0.3 * torch.randn(episodes, 20, generator=generator)
    return features, dreamt, (-2 + 0.5 * dreamt.float().log() + 0.6 * features[..., 3] + noise).exp()


@pytest.fixture(scope="module")
def score() -> Uncertainty:
    return fit_uncertainty(*rollouts(48, 0))


def test_it_tells_large_errors_and_means_what_it_says(score: Uncertainty) -> None:
    features, dreamt, error = rollouts(100, 1)
    value = score(features.flatten(0, 1), dreamt.flatten())
    large = error.flatten() > score.config.large
    assert auroc(value, large) > 0.9 and abs(score.config.auroc - auroc(value, large)) < 0.03
    for low, high in ((0.0, 0.1), (0.3, 0.5), (0.8, 1.0)):  # among frames of score p, a share p is wrong
        chosen = (value >= low) & (value < high)
        assert abs(float(large[chosen].float().mean() - value[chosen].mean())) < 0.1


def test_strangers_are_not_trusted(score: Uncertainty) -> None:
    features, dreamt, _ = rollouts(10, 2)
    known = score(features[:, 0], dreamt[:, 0])
    features[:, 0, 5] += 30.0  # a feature that no error of the fit depended on
    assert known.mean() < 0.2 and (score(features[:, 0], dreamt[:, 0]) > 0.9).all()


def test_auroc_and_token_errors() -> None:
    large = torch.tensor([False, True, False, True])
    assert auroc(torch.tensor([0.1, 0.9, 0.2, 0.8]), large) == 1.0
    assert auroc(torch.tensor([0.5, 0.5, 0.5, 0.5]), large) == 0.5
    assert auroc(torch.tensor([0.1, 0.3, 0.3, 0.2]), large) == pytest.approx(0.625)  # 2.5 of 4 pairs
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([True, True])) == 0.5
    soft = token_error(torch.ones(2, 3, 2), torch.tensor([1.0, 3.0]).view(2, 1, 1).expand(2, 3, 2))
    torch.testing.assert_close(soft, torch.tensor([0.0, 2.0]))
    assert token_error(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 9, 4]])).tolist() == [0.25]


def test_too_little_to_learn_from_is_said() -> None:
    with pytest.raises(InvalidArgument, match="needs at least 8 episodes"):
        fit_uncertainty(*rollouts(7, 0))
    with pytest.raises(CheckpointError, match="must have exactly the keys"):
        UncertaintyConfig.from_dict({"features": 3})
    with pytest.raises(InvalidArgument, match="large and known above 0"):
        UncertaintyConfig(1, 1, 0.0, 1.0, 0.0, 1.0, 0.5, 8, 20)


def test_a_checkpoint_keeps_it_and_old_ones_do_without(toy: Checkpoint, tmp_path: Path, score: Uncertainty) -> None:
    folder = save_checkpoint(dataclasses.replace(toy, uncertainty=score), tmp_path / "sure")
    again = load_checkpoint(folder).uncertainty
    assert again is not None and again.config == score.config
    features, dreamt, _ = rollouts(2, 3)
    torch.testing.assert_close(again(features[0], dreamt[0]), score(features[0], dreamt[0]), rtol=0, atol=0)
    plain = save_checkpoint(toy, tmp_path / "old")
    config = json.loads((plain / "config.json").read_text())
    del config["uncertainty"]  # as earlier versions wrote it
    (plain / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(plain).uncertainty is None
