"""The benchmarks of planning and learning: what they compare, where they stop, what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hma_gym.benchmarks import mpc, rl
from hma_gym.errors import InvalidArgument


def test_the_gain_is_over_the_same_starts() -> None:
    gain = mpc.paired_gain([True] * 8 + [False] * 2, [True] * 3 + [False] * 7)
    assert gain.value == pytest.approx(0.5) and 0 < gain.low < 0.5 < gain.high <= 1
    assert mpc.paired_gain([True, False], [True, False]).high == 0.0


def test_mpc_plans_and_writes_its_table(toy_folder: Path, tmp_path: Path) -> None:
    config = mpc.MpcConfig(
        out=tmp_path, checkpoint=str(toy_folder), base="random", samples=4, elites=1, rounds=1, horizon=2, execute=1,
        proposals=2, plans=1,
    )  # fmt: skip
    planners = mpc.arms(config)
    assert list(planners) == ["mpc-free", "mpc-over-base"]
    assert planners["mpc-over-base"].policy == "random" and planners["mpc-over-base"].search["samples"] == 2
    rates = {label: mpc.measure_rate(config, options) for label, options in planners.items()}
    # Proposals, samples and the mean in each of two plans, a kept elite in the second.
    assert rates["mpc-over-base"]["candidates_a_plan"] == (2 + 2 + 1 + 0.5)
    assert all(rate["candidates_a_second_cpu"] > 0 for rate in rates.values())
    outcomes = {"base": {0: False, 1: True}, "mpc-free": {0: True, 1: True}, "mpc-over-base": {0: False, 1: True}}
    table = mpc.write_table(config, outcomes, rates)
    content = json.loads(table.with_suffix(".json").read_text())
    assert content["policies"]["mpc-free"]["gain"]["value"] == 0.5
    assert "| mpc-free | 2 of 2 |" in table.read_text()
    assert "iCEM on the whole model of toy" in table.read_text()  # the toy knows no object
    with pytest.raises(InvalidArgument, match="nothing else to play"):
        mpc.MpcConfig(free=False)


def test_rl_stops_where_the_dream_is_still_believed(tmp_path: Path) -> None:
    log = [
        {"step": 0, "dream": 0.4, "truth": 0.4, "gap": 0.0},
        {"step": 10, "dream": 0.6, "truth": 0.5, "gap": 0.1},
        {"step": 20, "dream": 0.6, "truth": 0.6, "gap": 0.0},
        {"step": 30, "dream": 0.9, "truth": 0.5, "gap": 0.4},
    ]
    assert rl.stopping_point(log, 0.15) == 10
    assert rl.stopping_point(log[3:], 0.15) == 30
    config = rl.RlConfig(out=tmp_path, seeds=(5,))
    won = {
        (rl.TRUTH, "before"): {0: False, 1: False},
        (rl.TRUTH, "after-5"): {0: True, 1: False},
        (rl.DREAM, "after-5"): {0: True, 1: True},
    }
    table = rl.write_table(config, won, {5: log})
    content = json.loads(table.with_suffix(".json").read_text())
    assert content["gain"]["value"] == 0.5 and content["seeds"] == [[5, 0.0, 0.5, 1.0, 0.5, 10]]
    assert "| 5 | 30 | 0.9 | 0.5 | 0.4 |" in table.read_text()
    with pytest.raises(InvalidArgument, match="seeds must be different"):
        rl.RlConfig(seeds=(1, 1))
