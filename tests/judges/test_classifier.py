"""The classifier judge: contract, storage, calibration, and that it can learn."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from hma_gym.errors import CheckpointError, InvalidArgument, InvalidImage
from hma_gym.judges.classifier import ClassifierConfig, ClassifierJudge, build_classifier

SMALL = ClassifierConfig(window=2, image_size=(16, 16), channels=(4, 8, 8), width=16)


def _judge(config: ClassifierConfig = SMALL) -> ClassifierJudge:
    torch.manual_seed(0)
    return ClassifierJudge(config).eval()


def _windows(batch: int, config: ClassifierConfig = SMALL) -> Tensor:
    shape = (batch, config.window, *config.image_size, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_outputs() -> None:
    judge, frames = _judge(), _windows(5)
    probability, position = judge.probability(frames), judge.position(frames)
    assert probability.shape == (5,) and probability.dtype == torch.float32
    assert ((probability > 0) & (probability < 1)).all()
    assert position.shape == (5, 3)
    assert torch.allclose(judge.probability(frames[2:3]), probability[2:3], atol=1e-6)


def test_the_whole_window_is_seen() -> None:
    judge, frames = _judge(), _windows(1)
    for k in range(SMALL.window):
        changed = frames.clone()
        changed[:, k] = 255 - changed[:, k]
        assert not torch.allclose(judge.probability(changed), judge.probability(frames))


def test_storage_round_trip() -> None:
    judge, frames = _judge(), _windows(4)
    config = json.loads(json.dumps(judge.config.to_dict()))
    again = build_classifier(config, judge.tensors())
    assert again.config == judge.config
    assert torch.allclose(again.probability(frames), judge.probability(frames), atol=2e-3)
    assert torch.equal(build_classifier(config, again.tensors()).probability(frames), again.probability(frames))


def test_foreign_storage_is_refused() -> None:
    judge = _judge()
    config, tensors = judge.config.to_dict(), judge.tensors()
    with pytest.raises(CheckpointError, match="upgrade"):
        build_classifier({**config, "horoscope": 1}, tensors)
    with pytest.raises(CheckpointError, match="temperature"):
        build_classifier({**config, "temperature": -1.0}, tensors)
    with pytest.raises(CheckpointError, match="hidden.bias.*another config"):
        build_classifier({**config, "width": 24}, tensors)
    with pytest.raises(CheckpointError, match="got nothing"):
        build_classifier(config, {k: v for k, v in tensors.items() if k != "mix.bias"})


def test_temperature_softens_and_keeps_the_order() -> None:
    judge, frames = _judge(), _windows(16)
    soft = judge.calibrated(temperature=4.0, threshold=0.3)
    before, after = judge.probability(frames), soft.probability(frames)
    assert torch.equal(before.argsort(), after.argsort())
    assert ((after - 0.5).abs() <= (before - 0.5).abs()).all()
    assert torch.allclose(torch.logit(after) * 4, torch.logit(before), atol=1e-3)
    assert soft.threshold == 0.3 and judge.threshold == 0.5


@pytest.mark.parametrize(
    "change", [{"window": 0}, {"image_size": (20, 16)}, {"temperature": 0.0}, {"threshold": 1.0}, {"width": 0}]
)
def test_impossible_configs_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        dataclasses.replace(SMALL, **change)


def test_wrong_frames_are_refused() -> None:
    judge = _judge()
    with pytest.raises(InvalidImage, match="torch.uint8"):
        judge.probability(_windows(1).float())
    with pytest.raises(InvalidImage, match="resize"):
        judge.probability(torch.zeros(1, 2, 24, 16, 3, dtype=torch.uint8))
