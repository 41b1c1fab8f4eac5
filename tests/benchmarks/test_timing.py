"""The speed benchmarks: their clock, their tables, and that those of the environments run, at a trial size."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import replay_on_the_host

from hma_gym.benchmarks._timing import markdown_table, summary, time_calls
from hma_gym.benchmarks.profile import ProfileConfig, profile
from hma_gym.benchmarks.throughput import ThroughputConfig, throughput
from hma_gym.errors import InvalidArgument
from hma_gym.nn.int8 import lacks_int8
from hma_gym.nn.precision import Products

PRECISIONS: tuple[Products, ...] = ("float32", "bfloat16") if lacks_int8() else ("float32", "bfloat16", "int8")


def test_a_summary_is_a_median_with_its_interval_and_percentiles() -> None:
    timing = summary(np.array([1.0, 2.0, 3.0, 4.0, 100.0]))
    assert timing.median.value == 3.0 and 1.0 <= timing.median.low < 3.0 < timing.median.high <= 100.0
    assert timing.p90 > 4.0 and timing.p99 > timing.p90 and timing.repeats == 5
    rate = timing.rate(6.0)
    assert rate.value == 2.0 and rate.low == 6.0 / timing.median.high and rate.high == 6.0 / timing.median.low


def test_calls_take_turns_after_their_warm_up() -> None:
    order: list[str] = []
    timings = time_calls({name: lambda n=name: order.append(n) for name in "ab"}, repeats=3, warmup=2)  # type: ignore[misc]
    assert "".join(order) == "aabb" + "ab" * 3
    assert {name: timing.repeats for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_no_round_begins_after_the_limit_but_three() -> None:
    timings = time_calls({"sleep": lambda: time.sleep(0.02)}, repeats=100, limit_s=0.01)
    assert timings["sleep"].repeats == 3


def test_wall_time_sees_a_sleep_and_processor_time_does_not() -> None:
    def sleep() -> None:
        time.sleep(0.05)

    wall = time_calls({"sleep": sleep}, repeats=1, warmup=0, clock="wall")["sleep"]
    cpu = time_calls({"sleep": sleep}, repeats=1, warmup=0, clock="cpu")["sleep"]
    assert wall.median.value >= 0.05 > 0.03 > cpu.median.value


def test_timing_refuses_what_it_cannot_time() -> None:
    with pytest.raises(InvalidArgument, match="repeats=0"):
        time_calls({}, repeats=0)
    with pytest.raises(InvalidArgument, match="clock='cpu'"):
        time_calls({}, repeats=1, clock="cpu", device=torch.device("cuda"))


def test_a_table_shows_numbers_with_three_digits() -> None:
    table = markdown_table(("a", "b"), [(1.23456, "x"), (12345.6, 7)])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| 1.23 | x |", "| 12,346 | 7 |"]


def _read(paths: tuple[Path, Path]) -> tuple[dict[str, Any], str]:
    data = json.loads(paths[0].read_text())
    assert {"commit", "processor", "packages"} <= data["provenance"].keys()
    return data, paths[1].read_text()


def test_throughput_of_a_toy_checkpoint(toy_folder: Path, tmp_path: Path) -> None:
    config = ThroughputConfig(
        checkpoint=str(toy_folder),
        envs=(1, 2),
        chunk=2,
        precisions=PRECISIONS,
        ways=("eager", "packed"),
        repeats=2,
        growth_repeats=3,
        early=2,
        late=6,
        contexts=(2, 4),
        context_envs=2,
        ground_truth=(),
        out=tmp_path,
    )
    data, text = _read(throughput(config))
    assert [(row["envs"], row["precision"], row["way"]) for row in data["learned"]] == [
        (envs, precision, way) for envs in (1, 2) for precision in PRECISIONS for way in ("eager", "packed")
    ]
    assert [(row["what"], row["at"]) for row in data["growth"]] == [
        ("step", 2),
        ("step", 6),
        ("context", 2),
        ("context", 4),
    ]
    assert "chunk: frames/s" in text
    with pytest.raises(InvalidArgument, match="early=5"):
        ThroughputConfig(early=5, late=5)


def test_a_profile_of_graphs_has_the_parts_in_both_ways(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay_on_the_host(monkeypatch)
    config = ProfileConfig(
        checkpoint=str(toy_folder), envs=(2,), ways=("eager", "graphs"), repeats=1, matrix=64, copy_mb=1, out=tmp_path
    )
    parts = _read(profile(config))[0]["profiles"][0]["parts"]
    plain = [name for name in parts if not name.endswith(", graphs")]
    assert len(plain) == 6 and list(parts) == [*plain, *(f"{name}, graphs" for name in plain)]


def test_profile_of_a_toy_checkpoint(toy_folder: Path, tmp_path: Path) -> None:
    config = ProfileConfig(
        checkpoint=str(toy_folder), envs=(2,), ways=("eager", "packed"), repeats=2, matrix=64, copy_mb=1, out=tmp_path
    )
    data, text = _read(profile(config))
    found = data["profiles"][0]
    assert found["envs"] == 2 and found["trunk_flop"] > 0 and len(found["operations"]) == config.operations
    for way in ("", ", packed"):
        assert {f"{part}{way}" for part in ("step of the environment", "model step", "trunk", "decoder")} <= found[
            "parts"
        ].keys()
    seconds = [operation["seconds"] for operation in found["operations"]]
    assert seconds == sorted(seconds, reverse=True)
    assert "percent of the matrix rate" in text and found["trunk_moved"] > found["trunk_bytes"]
    with pytest.raises(InvalidArgument, match="envs"):
        ProfileConfig(envs=())


def test_a_profile_needs_a_precision_whose_rate_can_be_measured() -> None:
    with pytest.raises(InvalidArgument, match="matrix rate can be measured, got 'int8'"):
        ProfileConfig(precision="int8")
