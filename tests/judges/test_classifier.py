"""The classifier judge: contract, storage, calibration, and that it can learn."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from hma_gym.errors import CheckpointError, InvalidArgument, InvalidImage
from hma_gym.judges.classifier import ClassifierConfig, ClassifierJudge, build_classifier
from hma_gym.judges.protocol import told_state
from hma_gym.nn.precision import in_precision

TOLD = {"state_dim": 2, "state_mean": (0.5, 1.0), "state_std": (0.1, 0.2)}
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


def _feeling() -> ClassifierJudge:
    """Told agent_pos, and not silent about it."""
    judge = _judge(dataclasses.replace(SMALL, **TOLD))
    assert judge.sense is not None
    torch.nn.init.normal_(judge.sense[-1].weight, std=0.3)
    return judge


def test_told_agent_pos() -> None:
    judge, frames = _feeling(), _windows(4)
    poses = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(2))
    said = judge.probability(frames, poses)
    assert (
        judge.state_dim == 2
        and judge.code_size == SMALL.width + 3
        and not torch.equal(judge.position(frames), judge.position(frames, poses))
    )
    for k in range(2):
        moved = poses.clone()
        moved[:, k] += 0.05
        assert ((judge.probability(frames, moved) - said).abs() > 1e-5).all(), "the whole window is felt"
    codes = torch.stack([judge.code(frames[:, k], poses[:, k]) for k in range(2)], dim=1)
    assert torch.allclose(judge.probability_of_codes(codes), said, atol=1e-6)
    assert torch.allclose(codes[..., -3:-1] * torch.tensor((0.1, 0.2)) + torch.tensor((0.5, 1.0)), poses, atol=1.0)
    alone = torch.stack([judge.code(frames[:, k]) for k in range(2)], dim=1)
    assert not alone[..., -3:].any() and (codes[..., -1] == 1).all()
    assert torch.allclose(judge.probability_of_codes(alone), judge.probability(frames), atol=1e-6)
    again = build_classifier(json.loads(json.dumps(judge.config.to_dict())), judge.tensors())
    assert again.config == judge.config
    assert torch.allclose(again.probability(frames, poses), said, atol=2e-3)
    low = in_precision(judge, "bfloat16")
    assert torch.allclose(low.probability(frames, poses), said, atol=0.02)


def test_a_fresh_judge_does_not_heed_agent_pos_yet() -> None:
    alone, told, frames = _judge(), _judge(dataclasses.replace(SMALL, **TOLD)), _windows(4)
    assert all(torch.equal(tensor, told.state_dict()[name]) for name, tensor in alone.state_dict().items())
    assert torch.equal(told.probability(frames, torch.rand(4, 2, 2)), alone.probability(frames))
    assert torch.equal(told.probability(frames), alone.probability(frames))


def test_a_judge_stored_before_agent_pos_was_told_is_read() -> None:
    judge, frames = _judge(), _windows(2)
    config = {name: value for name, value in judge.config.to_dict().items() if not name.startswith("state_")}
    old = build_classifier(config, judge.tensors())
    assert old.config == judge.config and told_state(old) == 0 and old.code_size == SMALL.width
    assert {name.split(".")[0] for name in old.state_dict()} == {
        *("encoder", "project", "mix", "hidden", "logit_head", "position_head")
    }
    assert torch.allclose(old.probability(frames), judge.probability(frames), atol=2e-3)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 2, 3), torch.zeros(3, 2), torch.zeros(3, 2, 2).long()])
def test_wrong_agent_pos_is_refused(wrong: Tensor) -> None:
    judge, frames = _feeling(), _windows(3)
    for read in (judge.probability, judge.position):
        with pytest.raises(
            InvalidArgument, match=r"agent_pos of shape \(3, 2, 2\), got .*; give that of the same frames"
        ):
            read(frames, wrong)
    with pytest.raises(InvalidArgument, match=r"\(3, 2\)"):
        judge.code(frames[:, 0], wrong[:, :1])
    with pytest.raises(InvalidArgument, match="needs frames alone"):
        _judge().probability(frames, torch.zeros(3, 2, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"window": 0},
        {"image_size": (20, 16)},
        {"temperature": 0.0},
        {"threshold": 1.0},
        {"width": 0},
        {"state_dim": 2},
        {**TOLD, "state_dim": 3},
        {**TOLD, "state_std": (0.1, 0.0)},
    ],
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
