"""What the loop does while it trains: learning, limits, evaluation, values that are not finite, the log."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_toy import Squares, Toy, toy_config

from hma_gym.errors import DatasetError, InvalidArgument, MissingExtra, StorageError, TrainingDiverged
from hma_gym.training import EMA, Every, read_log, saved_weights, train
from hma_gym.training.logging import RunningMeans
from hma_gym.training.saved import saved_files


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_falls(tmp_path: Path, optimizer: str, precision: Any) -> None:
    config = dataclasses.replace(toy_config(tmp_path, optimizer, steps=150), precision=precision)
    train(Toy(), Squares(), config)
    losses = [row["loss"] for row in read_log(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < 0.6 * losses[0]


def test_compiled_loss_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = Toy(), Toy()
    train(eager, Squares(), toy_config(tmp_path / "eager", steps=3))
    # Traced and differentiated by the compiler, but run without its C++ back end, which takes half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    train(compiled, Squares(), dataclasses.replace(toy_config(tmp_path / "compiled", steps=3), compile=True))
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value)


class SlowSquares(Squares):
    def batch(self, step: int) -> dict[str, Tensor]:
        time.sleep(0.02)
        return super().batch(step)


def test_max_minutes_stops_in_time_and_saved(tmp_path: Path) -> None:
    config = dataclasses.replace(toy_config(tmp_path, steps=10_000), max_minutes=0.5 / 60)
    began = time.monotonic()
    result = train(Toy(), SlowSquares(), config)
    assert (result.reason, result.finished) == ("max_minutes", False)
    assert 0 < result.step < 10_000
    assert time.monotonic() - began < 10
    assert [path.stem for path in saved_files(tmp_path)] == [f"step-{result.step:010d}"]
    again = train(Toy(), SlowSquares(), config)
    assert again.step > result.step and again.minutes > result.minutes


def test_a_time_budget_is_a_schedule(tmp_path: Path) -> None:
    config = dataclasses.replace(
        toy_config(tmp_path), steps=None, schedule_minutes=0.6 / 60, decay="linear", warmup_steps=0, log_every=1
    )
    result = train(Toy(), SlowSquares(), config, lambda model, step: {"at": step})
    assert result.finished and 0.6 / 60 <= result.minutes < 10 / 60
    assert result.evaluation == {"at": result.step}
    rates = [row["lr"] for row in read_log(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0.5e-2 and rates[-1] < 0.5e-2


def test_evaluation_sees_the_average_in_eval_mode_and_training_goes_on(tmp_path: Path) -> None:
    model = Toy()
    seen: list[tuple[int, bool, bool, Tensor]] = []

    def look(evaluated: nn.Module, step: int) -> dict[str, float]:
        seen.append((step, evaluated.training, torch.is_grad_enabled(), model.hidden.weight.detach().clone()))
        return {"score": float(step), "empty": math.nan}

    config = dataclasses.replace(toy_config(tmp_path), evaluation=Every(steps=16))
    result = train(model, Squares(), config, look)
    assert [(step, training, grad) for step, training, grad, _ in seen] == [
        (16, False, False),
        (32, False, False),
        (40, False, False),
    ]
    assert torch.equal(seen[-1][3], result.ema.average["hidden.weight"])
    assert not torch.equal(seen[-1][3], model.hidden.weight)
    rows = [row for row in read_log(tmp_path / "metrics.jsonl") if row["kind"] == "eval"]
    assert [(row["step"], row["score"], row["empty"]) for row in rows] == [
        (16, 16, None),
        (32, 32, None),
        (40, 40, None),
    ]
    assert result.evaluation["score"] == 40


def test_an_evaluator_that_fails_costs_no_training(tmp_path: Path) -> None:
    def fail(model: nn.Module, step: int) -> dict[str, float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(Toy(), Squares(), toy_config(tmp_path), fail)
    assert train(Toy(), Squares(), toy_config(tmp_path)).step == 40
    assert [path.stem for path in saved_files(tmp_path)] == ["step-0000000040"]


class BrokenSquares(Squares):
    """Batches that are NaN at some steps."""

    def __init__(self, bad: range) -> None:
        self.bad = bad

    def batch(self, step: int) -> dict[str, Tensor]:
        batch = super().batch(step)
        return {**batch, "y": batch["y"] * math.nan} if step in self.bad else batch


def test_a_few_bad_batches_are_survived_and_reported(tmp_path: Path) -> None:
    model = Toy()
    config = dataclasses.replace(toy_config(tmp_path), nonfinite_limit=4)
    result = train(model, BrokenSquares(range(12, 15)), config)
    rows = [row for row in read_log(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["nonfinite_steps"] for row in rows] == [0, 3, 0, 0]
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(value.isfinite().all() for value in result.ema.average.values())


@pytest.mark.parametrize("log_every", [10, 1000])
def test_divergence_is_an_error_and_leaves_the_last_good_state(tmp_path: Path, log_every: int) -> None:
    config = dataclasses.replace(
        toy_config(tmp_path), nonfinite_limit=4, checkpoint=Every(steps=10), log_every=log_every
    )
    with pytest.raises(TrainingDiverged, match="not finite for .* steps in a row"):
        train(Toy(), BrokenSquares(range(21, 100)), config)
    assert [path.stem[-2:] for path in saved_files(tmp_path)] == ["10", "20"]
    assert all(value.isfinite().all() for value in saved_weights(tmp_path, "model").values())


def test_broken_weights_are_never_saved(tmp_path: Path) -> None:
    class BreaksAtStep25(Squares):
        def batch(self, step: int) -> dict[str, Tensor]:
            if step == 25:
                model.out.bias.data.fill_(math.inf)
            return super().batch(step)

    model = Toy()
    config = dataclasses.replace(toy_config(tmp_path), checkpoint=Every(steps=10))
    with pytest.raises(TrainingDiverged, match="weights are not finite: out.bias"):
        train(model, BreaksAtStep25(), config)
    assert all(value.isfinite().all() for value in saved_weights(tmp_path, "model").values())


def test_metrics_wait_for_the_device_only_when_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    for name in ("item", "tolist"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, original=original: reads.append(1) or original(self))
    config = dataclasses.replace(toy_config(tmp_path, steps=100), log_every=50, deterministic=False)
    train(Toy(), Squares(), config)
    assert 0 < len(reads) <= 8


def test_running_means_leave_out_what_is_not_finite() -> None:
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(math.inf)})
    means.add({"a": torch.tensor(math.nan), "b": torch.tensor(math.inf)})
    means.add({"a": torch.tensor(3.0), "c": torch.tensor(2)})
    read = means.read()
    assert (read["a"], read["c"]) == (2.0, 2.0) and math.isnan(read["b"])
    assert means.read() == {}


def test_a_log_cut_short_by_a_kill_is_read_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]
    path.write_text('{"ste\n' + json.dumps({"step": 1}) + "\n")
    with pytest.raises(DatasetError, match="line 1 is not JSON"):
        read_log(path)
    with pytest.raises(DatasetError, match="right run folder"):
        read_log(tmp_path / "absent")


def test_tensorboard_events_or_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(toy_config(tmp_path), tensorboard=True)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tensorboard", None)
        with pytest.raises(MissingExtra, match=r"hma_gym\[train\]"):
            train(Toy(), Squares(), config)
    pytest.importorskip("tensorboard")
    train(Toy(), Squares(), config)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_an_out_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="out"):
        train(Toy(), Squares(), toy_config(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "exactly one of steps and schedule_minutes"),
        ({"schedule_minutes": 3.0}, "exactly one of steps and schedule_minutes"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"precision": "fp16"}, "precision must be one of"),
        ({"decay": "step"}, "decay must be one of"),
        ({"decay_fraction": 1.5}, r"decay_fraction must be in \[0, 1\], got 1.5"),
        ({"log_every": 0}, "log_every must be 1 or more"),
        ({"recipe": {"model": Toy}}, "recipe must hold JSON values"),
    ],
)
def test_configurations_that_break_a_rule(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        dataclasses.replace(toy_config(tmp_path), **changes)


def test_ema_forgets_its_start_and_then_averages() -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.99)
    with torch.no_grad():
        model.weight.fill_(1.0)
    expected = ema.average["weight"].clone()
    for n in range(200):
        ema.update(model)
        decay = min(0.99, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * torch.ones(1, 1)
    torch.testing.assert_close(ema.average["weight"], expected)
    with torch.no_grad():
        model.weight.fill_(7.0)
    with pytest.raises(RuntimeError), ema.applied_to(model):
        torch.testing.assert_close(model.weight.detach(), expected)
        raise RuntimeError
    assert model.weight.item() == 7.0


def test_an_average_that_never_moves_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"ema_decay must be in \[0, 1\), got 1.0"):
        EMA(nn.Linear(1, 1), decay=1.0)
