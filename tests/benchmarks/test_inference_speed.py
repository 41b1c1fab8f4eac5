"""The benchmark of the paper's models runs, at a trial size, and refuses what it does not know."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from recorded import replay_on_the_host

from hma_gym.benchmarks._reference import load_reference
from hma_gym.benchmarks.inference_speed import InferenceSpeedConfig, inference_speed
from hma_gym.errors import InvalidArgument, UnknownName


def test_inference_speed_compares_the_ways(tmp_path: Path) -> None:
    config = InferenceSpeedConfig(batches=(1, 2), layers=1, side=2, repeats=2, packed=True, out=tmp_path)
    data_path, table_path = inference_speed(config)
    data, text = json.loads(data_path.read_text()), table_path.read_text()
    assert [(row["batch"], row["engine"]) for row in data["rows"]] == [
        (batch, engine) for batch in (1, 2) for engine in ("cached", "sliding", "same context")
    ]
    assert all(row["timing"]["median"]["value"] > 0 for row in data["rows"])
    assert data["rows"][0]["cache_mb"] == 2 * 12 * (4 + 64) * 256 * 4 / 1e6
    assert text.count("| base |") == 6 and "weights packed" in text
    assert {(row["way"], row["precision"]) for row in data["rows"]} == {("eager", "float32")}


def test_inference_speed_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = InferenceSpeedConfig(
        layers=1, side=2, ways=("eager", "compiled"), engines=("cached",), packed=True, repeats=1, out=tmp_path
    )
    found = json.loads(inference_speed(config)[0].read_text())["rows"]
    assert [(row["engine"], row["way"]) for row in found] == [("cached", "eager"), ("cached", "compiled")]


@pytest.mark.int8
@pytest.mark.parametrize(("model", "rows"), [("base", 3), ("mar-base", 2)])
def test_inference_speed_in_integers(model: str, rows: int, tmp_path: Path) -> None:
    config = InferenceSpeedConfig(
        (model,), layers=1, side=2, precisions=("int8",), packed=True, repeats=1, out=tmp_path
    )
    found = json.loads(inference_speed(config)[0].read_text())["rows"]
    assert [row["precision"] for row in found] == ["int8"] * rows
    with pytest.raises(InvalidArgument, match="reference_precisions must not name 'int8'"):
        InferenceSpeedConfig(reference_precisions=("float32", "int8"))


def test_inference_speed_records_graphs_and_compares_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = replay_on_the_host(monkeypatch)
    precisions = ("float32", "tf32", "bfloat16")
    config = InferenceSpeedConfig(layers=1, side=2, repeats=1, ways=("graphs",), precisions=precisions, out=tmp_path)
    rows = json.loads(inference_speed(config)[0].read_text())["rows"]
    assert [(row["precision"], row["engine"]) for row in rows] == [
        (precision, engine) for precision in precisions for engine in ("cached", "sliding", "same context")
    ]
    assert len(recorded) == 3 * 4  # sliding has two
    late = dataclasses.replace(config, limit_s=0.0)
    assert json.loads(inference_speed(late)[0].read_text())["rows"] == []


def test_the_soft_models_run_with_either_head(tmp_path: Path) -> None:
    config = InferenceSpeedConfig(models=("mar-base",), layers=1, side=1, repeats=1, warmup=0, out=tmp_path)
    data_path, table_path = inference_speed(config)
    rows = json.loads(data_path.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["cached, 100-step DDIM", "cached, 4-step flow"]
    assert rows[0]["cache_mb"] == 2 * 12 * (1 + 1 + 64) * 256 * 4 / 1e6
    assert rows[0]["timing"]["median"]["value"] > 4 * rows[1]["timing"]["median"]["value"] > 0
    assert table_path.read_text().count("| mar-base |") == 2


def test_inference_speed_refuses_unknown_models_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="huge"):
        InferenceSpeedConfig(models=("huge",))
    with pytest.raises(InvalidArgument, match="batches"):
        InferenceSpeedConfig(batches=())
    with pytest.raises(InvalidArgument, match=r"checkout of github.com/liruiw/HMA"):
        load_reference(tmp_path, "plain")
