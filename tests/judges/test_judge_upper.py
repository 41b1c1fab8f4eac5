"""The second stage of a judge's training: all above the codes of frames, on codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_toy import toy_episode, write_toy

from hma_gym.errors import InvalidArgument
from hma_gym.judges.classifier import ClassifierConfig, ClassifierJudge
from hma_gym.judges.rows import LabelledRows, label_rows
from hma_gym.training.judge import JudgeTrainConfig, JudgeTraining, score_rows, train_judge
from hma_gym.training.judge_upper import CodeBatches, coded_rows, train_upper


def _judge(state_dim: int = 0) -> ClassifierJudge:
    torch.manual_seed(0)
    told = {"state_dim": state_dim, "state_mean": (0.0,) * state_dim, "state_std": (1.0,) * state_dim}
    shape = ClassifierConfig(window=2, image_size=(16, 16), channels=(8, 8, 16), width=32)
    return ClassifierJudge(dataclasses.replace(shape, **told))


def _rows(first: int, count: int) -> LabelledRows:
    return label_rows([toy_episode(seed) for seed in range(first, first + count)])


def _train(judge: ClassifierJudge, rows: LabelledRows, out: Path, steps: int) -> None:
    config = JudgeTrainConfig(data=Path("unused"), out=out, decision_height=0.85)
    model = JudgeTraining(judge, config, None)
    parts = [coded_rows(judge.eval(), rows, rows.frames_FHWC)]
    train_upper(
        judge.train(),
        parts,
        model.told,
        model.loss_of,
        out,
        steps=steps,
        decision_height=0.85,
        seed=0,
        progress=False,
    )
    judge.eval()


def test_batches_are_pure_near_the_boundary_and_never_reach_into_another_episode() -> None:
    judge, rows = _judge().eval(), _rows(0, 6)
    part = coded_rows(judge, rows, rows.frames_FHWC, batch=7)
    assert part.codes_FD.shape == (len(rows), 32)
    whole = judge.code(torch.from_numpy(rows.frames_FHWC)).numpy()
    np.testing.assert_allclose(part.codes_FD, whole, atol=2e-3)
    batches = CodeBatches([part, part], judge.window, 0.85, seed=3)
    first, again, other = batches.batch(5), batches.batch(5), batches.batch(6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["codes_BKD"], other["codes_BKD"])
    near = (first["position_B3"][:, 2] - 0.85).abs() < 0.03
    assert near.float().mean() > 0.5
    where = {code.tobytes(): n for n, code in enumerate(part.codes_FD.astype(np.float32))}
    windows = np.array([[where[frame.numpy().tobytes()] for frame in window] for window in first["codes_BKD"]])
    alike = np.array([[rows.first_F[n] for n in window] for window in windows])
    assert (alike[:, 0] == alike[:, 1]).mean() > 0.95  # some frames of different episodes look the same


@pytest.mark.parametrize("state", [False, True])
def test_it_learns_above_the_codes_and_leaves_what_is_below(tmp_path: Path, state: bool) -> None:
    data = write_toy(tmp_path / "toy.hdf5", [toy_episode(seed) for seed in range(40)])
    shape = {"window": 2, "channels": (8, 8, 16), "width": 32, "state": state, "fade_red": False}
    config = JudgeTrainConfig(
        data=data, out=tmp_path / "run", steps=70, upper_steps=0, decision_height=0.85, progress=False, **shape
    )
    judge = train_judge(config).judge.calibrated(1.0, 0.5)
    assert judge.state_dim == (9 if state else 0)
    held_out = _rows(1000, 30)

    def right() -> float:
        said, _ = score_rows(judge, held_out, np.arange(len(held_out)))
        return float(((said >= 0.5) == held_out.success_F).mean())

    before, at_first = {name: tensor.clone() for name, tensor in judge.state_dict().items()}, right()
    _train(judge.requires_grad_(True), _rows(0, 40), tmp_path / "upper", steps=900)
    for name, tensor in judge.state_dict().items():
        below = name.startswith(("encoder.", "project."))
        assert torch.equal(tensor, before[name]) == below, name
    assert at_first < 0.8 and right() > 0.95


def test_interrupted_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, rows = _judge(), _rows(0, 10)
    _train(whole, rows, tmp_path / "whole", steps=12)
    again = _judge()
    _train(again, rows, tmp_path / "whole", steps=12)  # finished: nothing is trained anew
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_its_steps_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="upper_steps must be 0 or more, got -1"):
        JudgeTrainConfig(data=Path("unused"), out=Path("unused"), upper_steps=-1)
