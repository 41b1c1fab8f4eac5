"""Checkpoints on disk: what is saved is what is loaded, and anything wrong with a folder is one clear error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_checkpoint import toy_checkpoint, toy_domain

import hma_gym.dynamics.checkpoint as module
from hma_gym.dynamics.checkpoint import (
    SCHEMA_VERSION,
    Checkpoint,
    StartBank,
    checkpoint_folder,
    load_checkpoint,
    save_checkpoint,
    start_bank,
)
from hma_gym.errors import CheckpointError, MissingExtra, StorageError

FILES = ["config.json", "dynamics.safetensors", "judge.safetensors", "starts.safetensors", "tokenizer.safetensors"]


@pytest.fixture
def folder(toy_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(toy_folder, tmp_path / "toy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json as someone would by hand."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def trust(folder: Path, name: str) -> None:
    """Make config.json vouch for the file as it is now."""
    edit(folder, lambda c: c["files"].update({name: hashlib.sha256((folder / name).read_bytes()).hexdigest()}))


def test_on_a_cpu_convolutions_have_their_channels_last_and_files_do_not_know(toy_folder: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(toy_folder)
    convolutions = [m for m in loaded.tokenizer.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convolutions and all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    again = save_checkpoint(loaded, tmp_path / "again")
    assert (again / "tokenizer.safetensors").read_bytes() == (toy_folder / "tokenizer.safetensors").read_bytes()


def test_full_precision_is_kept_to_the_bit(tmp_path: Path) -> None:
    checkpoint = toy_checkpoint()
    loaded = load_checkpoint(save_checkpoint(checkpoint, tmp_path / "full", half=False, card="# a card\n"))
    for name in ("tokenizer", "dynamics", "judge"):
        saved, found = (getattr(c, name).state_dict() for c in (checkpoint, loaded))
        assert saved.keys() == found.keys()
        assert all(torch.equal(saved[key], found[key]) and saved[key].dtype == found[key].dtype for key in saved)
        assert not getattr(loaded, name).training
        assert not any(parameter.requires_grad for parameter in getattr(loaded, name).parameters())
        assert getattr(loaded, name).config == getattr(checkpoint, name).config
    for field in dataclasses.fields(StartBank):
        saved, found = (getattr(c.starts, field.name) for c in (checkpoint, loaded))
        assert saved.dtype == found.dtype and np.array_equal(saved, found)
    assert loaded.dynamics.domains == checkpoint.dynamics.domains and loaded.domain == toy_domain()
    assert (loaded.name, loaded.task) == ("toy", "lift") and len(loaded.digest) == 64
    assert (tmp_path / "full" / "README.md").read_text() == "# a card\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_half_precision_halves_the_weights_and_is_computed_in_single(toy_folder: Path, toy: Checkpoint) -> None:
    checkpoint = toy_checkpoint()
    stored = load_file(toy_folder / "dynamics.safetensors")
    large = [key for key, value in checkpoint.dynamics.state_dict().items() if value.numel() > 1024]
    assert large and all(stored[key].dtype == torch.float16 for key in large)
    for key, value in toy.dynamics.state_dict().items():
        expected = checkpoint.dynamics.state_dict()[key]
        assert value.dtype == expected.dtype and torch.allclose(value, expected, rtol=1e-3, atol=1e-6)


def test_judge_provenance_and_several_domains_survive(tmp_path: Path) -> None:
    checkpoint = toy_checkpoint(toy_domain("small", 2, 0), toy_domain("large", 14, 5), judge=False, task="")
    checkpoint = dataclasses.replace(checkpoint, provenance={"steps": 12, "data": ["a.hdf5"]})
    loaded = load_checkpoint(save_checkpoint(checkpoint, tmp_path / "two"))
    assert loaded.judge is None and loaded.provenance == {"steps": 12, "data": ["a.hdf5"]}
    assert [domain.name for domain in loaded.dynamics.domains] == ["small", "large"]


def test_saving_again_replaces_the_folder_whole(folder: Path) -> None:
    before = load_checkpoint(folder).digest
    save_checkpoint(dataclasses.replace(toy_checkpoint(judge=False), name="new"), folder)
    assert load_checkpoint(folder).name == "new" and not (folder / "judge.safetensors").exists()
    assert load_checkpoint(folder).digest != before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_save_that_fails_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(tensors: Any, path: Path) -> None:
        if path.name == "starts.safetensors":
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(module, "save_file", full_disk)
    digest = load_checkpoint(folder).digest
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(toy_checkpoint(judge=False), folder)
    assert load_checkpoint(folder).digest == digest
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="must be writable"):
        save_checkpoint(toy_checkpoint(), tmp_path / "x")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="must be writable"):
        save_checkpoint(toy_checkpoint(), tmp_path / "file" / "x")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{name}.*fetch the checkpoint again"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_changed_byte_is_noticed(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=f"{name}.*sha256"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_damaged_file_that_config_vouches_for_is_noticed(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x00" * 100)
    trust(folder, name)
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged"):
        load_checkpoint(folder)


def test_a_newer_checkpoint_says_how_to_upgrade(folder: Path) -> None:
    edit(folder, lambda c: c.update(schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(CheckpointError, match="schema version 2.*pip install --upgrade hma_gym"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.pop("schema_version"), "no hma_gym checkpoint"),
        (lambda c: c.update(schema_version="1"), "no hma_gym checkpoint"),
        (lambda c: c.pop("starts", c.pop("domains")), r"lacks the keys \['domains'\]"),
        (lambda c: c["domains"][0].update(colour="red"), "unknown keys.*colour"),
        (lambda c: c["domains"][0].update(action_dim=6), "action_low must have 6 values"),
        (lambda c: c["tokenizer"].update(kind="jpeg"), "jpeg"),
        (lambda c: c["tokenizer"].update(depth=3), "depth"),
        (lambda c: c["dynamics"].update(depth=3), "depth"),
        (lambda c: c["dynamics"]["trunk"].pop("window"), "window"),
        (lambda c: c["dynamics"]["trunk"].update(heads=7), "divisible"),
        (lambda c: c["dynamics"]["head"].update(kind="pixel"), "head kind"),
        (lambda c: c["dynamics"]["trunk"].update(width=48), "dynamics.safetensors.*do not fit"),
        (lambda c: c["tokenizer"].update(channels=5), "tokenizer.safetensors.*do not fit"),
        (lambda c: c["judge"].update(width=9), "judge.safetensors.*do not fit"),
        (lambda c: c["judge"].update(mood="mild"), "mood"),
        (lambda c: c.update(domains=[]), "one or more domains"),
    ],
)
def test_a_config_that_was_changed_is_refused(folder: Path, change: Callable[[Any], object], text: str) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=text):
        load_checkpoint(folder)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    path = folder / "dynamics.safetensors"
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)
    trust(folder, path.name)
    with pytest.raises(CheckpointError, match="1 tensors do not fit"):
        load_checkpoint(folder)


def test_starts_are_complete_and_of_one_length(folder: Path) -> None:
    path = folder / "starts.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "seeds_N": tensors["seeds_N"][:-1].clone()}, path)
    trust(folder, path.name)
    with pytest.raises(CheckpointError, match="equal lengths"):
        load_checkpoint(folder)
    tensors.pop("states_NS")
    save_file(tensors, path)
    trust(folder, path.name)
    with pytest.raises(CheckpointError, match="must hold"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="one or more starts"):
        StartBank(*(np.zeros((0, 1), dtype) for dtype in (np.uint8, np.float32, np.float64, np.int64)))


def test_starts_from_lists() -> None:
    bank = start_bank([np.zeros((8, 8, 3), np.uint8)] * 2, [np.zeros(3, np.float32)] * 2)
    assert len(bank) == 2 and bank.states_NS.shape == (2, 0) and bank.seeds_N.tolist() == [-1, -1]


def test_where_a_checkpoint_is_looked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHIPPED", tmp_path)
    assert checkpoint_folder("toy") == folder and load_checkpoint("toy").name == "toy"
    assert checkpoint_folder(str(folder)) == checkpoint_folder(folder) == folder
    for wrong in ("nowhere", tmp_path / "nowhere", "a/b/c", "/org/name"):
        with pytest.raises(CheckpointError, match=r"a shipped name \(toy\), a folder, or a hub id"):
            load_checkpoint(wrong)
    with pytest.raises(CheckpointError, match="no_config.*must hold a readable config.json"):
        (tmp_path / "no_config").mkdir()
        load_checkpoint(tmp_path / "no_config")


def test_a_hub_id_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"hma_gym\[hub\]"):
        load_checkpoint("someone/something")


@pytest.mark.parametrize("damage", ["missing", "truncated", "tampered", "newer"])
def test_gymnasium_make_passes_the_error_on(folder: Path, damage: str) -> None:
    weights = folder / "dynamics.safetensors"
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "tampered":
        edit(folder, lambda c: c["files"].update({"dynamics.safetensors": "0" * 64}))
    else:
        edit(folder, lambda c: c.update(schema_version=99))
    for make in (gymnasium.make, gymnasium.make_vec):
        with pytest.raises(CheckpointError):
            make("HMA-Lift-v0", checkpoint=folder)


def test_a_tokenizer_of_another_kind_than_the_model_is_refused(toy: Checkpoint) -> None:
    class Discrete(type(toy.tokenizer)):  # type: ignore[misc]
        kind = "vq"

    tokenizer = Discrete(toy.tokenizer.config)
    with pytest.raises(CheckpointError, match="'vq' tokens.*needs 'soft' ones"):
        dataclasses.replace(toy, tokenizer=tokenizer)


def test_moving_to_a_device_moves_every_part() -> None:
    moved = toy_checkpoint().to("meta")
    assert all(p.is_meta for part in (moved.tokenizer, moved.dynamics, moved.judge) for p in part.parameters())
