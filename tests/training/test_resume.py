"""An interrupted run, resumed, ends with the weights of an uninterrupted one; what does not match is refused."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_toy import Squares, Toy, endless_config, toy_config

from hma_gym.errors import ResumeError
from hma_gym.training import Every, OptimizerConfig, TrainConfig, read_log, saved_weights, train
from hma_gym.training.saved import read_state, saved_files

SCRIPT = Path(__file__).with_name("training_toy.py")


class SignalledSquares(Squares):
    """Sends this process a signal while it makes the batch of one step."""

    def __init__(self, at: int, number: int = signal.SIGTERM) -> None:
        self.at = at
        self.number = number

    def batch(self, step: int) -> dict[str, Tensor]:
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return super().batch(step)


def assert_same_run(first: Path, second: Path) -> None:
    a, b = read_state(saved_files(first)[-1]), read_state(saved_files(second)[-1])
    assert (a.step, a.ema_updates, a.tensors.keys()) == (b.step, b.ema_updates, b.tensors.keys())
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor, b.tensors[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_interrupted_at_five_random_steps_equals_uninterrupted(tmp_path: Path, optimizer: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(Toy(), Squares(), toy_config(whole, optimizer))
    config = toy_config(parts, optimizer)
    stops = sorted(random.Random(optimizer).sample(range(1, 39), 5))
    for stop in stops:
        torch.rand(7)  # What the process drew before must not matter.
        result = train(Toy(), SignalledSquares(at=stop), config)
        assert (result.reason, result.finished, result.step) == ("signal", False, stop + 1)
    result = train(Toy(), Squares(), config)
    assert (result.reason, result.finished, result.step) == ("finished", True, 40)
    assert_same_run(whole, parts)
    losses = [
        [(row["step"], row["loss"]) for row in read_log(run / "metrics.jsonl") if row["kind"] == "train"]
        for run in (whole, parts)
    ]
    assert [step for step, _ in losses[1]] == [10, 20, 30, 40]
    assert [step for step, _ in losses[0]] == [10, 20, 30, 40]


def test_evaluation_and_prefetch_change_no_weight(tmp_path: Path) -> None:
    train(Toy(), Squares(), toy_config(tmp_path / "plain"))

    def draws(model: nn.Module, step: int) -> dict[str, float]:
        return {"noise": torch.rand(()).item()}

    watched = dataclasses.replace(toy_config(tmp_path / "watched"), evaluation=Every(steps=3), prefetch=2)
    train(Toy(), Squares(), watched, draws)
    assert_same_run(tmp_path / "plain", tmp_path / "watched")


def test_training_leaves_the_callers_generator_alone(tmp_path: Path) -> None:
    model = Toy()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, Squares(), toy_config(tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_killed_without_warning_then_resumed(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not saved_files(killed) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0.0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = read_state(saved_files(killed)[-1]).step + 50
    config = dataclasses.replace(endless_config(killed), steps=steps)
    assert train(Toy(), Squares(), config).step == steps
    train(Toy(), Squares(), dataclasses.replace(config, out=whole, checkpoint=Every()))
    assert_same_run(killed, whole)
    assert sorted(p.suffix for p in (killed / "saved").iterdir()) == [".safetensors"] * 2
    assert [row["step"] for row in read_log(killed / "metrics.jsonl") if row["kind"] == "train"] == [
        row["step"] for row in read_log(whole / "metrics.jsonl") if row["kind"] == "train"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_and_handlers_are_given_back(
    tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    config = dataclasses.replace(toy_config(tmp_path), progress=True)
    assert train(Toy(), SignalledSquares(at=10, number=number), config).reason == "signal"
    words = capfd.readouterr().err
    assert "stopping after this step, then saving; once more to stop at once" in words
    assert f"stopped by a signal; run again to go on: step 11, 0.0 minutes, in {tmp_path}" in words
    assert signal.getsignal(number) is before


def stopped_run(out: Path, **changes: Any) -> TrainConfig:
    """A run that has done 11 of its 40 steps."""
    config = dataclasses.replace(toy_config(out), **changes)
    train(Toy(), SignalledSquares(at=10, number=signal.SIGINT), config)
    return config


def test_other_configuration_is_refused_field_by_field(tmp_path: Path) -> None:
    config = stopped_run(tmp_path, recipe={"width": 16, "data": {"windows": 8}})
    changed = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(lr=0.5),
        seed=3,
        recipe={"width": 16, "data": {"windows": 9}},
        log_every=3,
    )
    with pytest.raises(ResumeError) as caught:
        train(Toy(), Squares(), changed)
    message = str(caught.value)
    assert "optimizer.lr: 0.01 then, 0.5 now" in message
    assert "recipe.data.windows: 8 then, 9 now" in message
    assert "seed: 0 then, 3 now" in message
    assert "width: 16" not in message and "log_every: " not in message


def test_other_model_is_refused(tmp_path: Path) -> None:
    config = stopped_run(tmp_path)
    model = Toy()
    model.hidden = nn.Linear(4, 8)
    with pytest.raises(ResumeError, match=r"model hidden.weight: \(16, 4\) torch.float32 then, \(8, 4\)"):
        train(model, Squares(), config)


def test_watching_differently_is_allowed(tmp_path: Path) -> None:
    config = stopped_run(tmp_path)
    free = dataclasses.replace(config, log_every=7, checkpoint=Every(steps=9), max_minutes=5.0, resume="must")
    assert train(Toy(), Squares(), free).finished


def test_a_run_may_be_lengthened_only_on_its_plateau(tmp_path: Path) -> None:
    config = stopped_run(tmp_path / "wsd", decay="wsd", decay_fraction=0.5)
    longer = dataclasses.replace(config, steps=50)
    assert train(Toy(), Squares(), longer).step == 50
    with pytest.raises(ResumeError, match="steps: 50 then, 60 now"):
        train(Toy(), Squares(), dataclasses.replace(config, steps=60))
    cosine = stopped_run(tmp_path / "cosine", decay="cosine")
    with pytest.raises(ResumeError, match="steps: 40 then, 50 now"):
        train(Toy(), Squares(), dataclasses.replace(cosine, steps=50))


def test_resume_never_and_must(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="holds no saved state"):
        train(Toy(), Squares(), dataclasses.replace(toy_config(tmp_path), resume="must"))
    config = stopped_run(tmp_path)
    with pytest.raises(ResumeError, match="already holds a run"):
        train(Toy(), Squares(), dataclasses.replace(config, resume="never"))


def test_a_damaged_state_is_refused_and_the_one_before_still_works(tmp_path: Path) -> None:
    config = stopped_run(tmp_path, checkpoint=Every(steps=5))
    newest = saved_files(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(ResumeError, match=f"delete {newest.name} to go on from the saved state before it"):
        train(Toy(), Squares(), config)
    newest.unlink()
    assert train(Toy(), Squares(), config).finished


def test_saved_weights_are_the_average(tmp_path: Path) -> None:
    model = Toy()
    result = train(model, Squares(), toy_config(tmp_path))
    averaged, trained = saved_weights(tmp_path), saved_weights(tmp_path, "model")
    for name, value in result.ema.state_dict(model).items():
        assert torch.equal(value, averaged[name])
        assert torch.equal(model.state_dict()[name], trained[name])
        assert not torch.equal(averaged[name], trained[name])
    with pytest.raises(ResumeError, match="holds no saved training state"):
        saved_weights(tmp_path / "saved")


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    first = train(Toy(), Squares(), toy_config(tmp_path))
    model = Toy()
    again = train(model, Squares(), toy_config(tmp_path))
    assert again.finished and again.step == first.step
    assert torch.equal(model.hidden.weight, saved_weights(tmp_path, "model")["hidden.weight"])
