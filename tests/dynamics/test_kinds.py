"""Soft and discrete parts never meet: whichever way they are brought together, one error says so."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import gymnasium
import pytest
import torch
from toy_checkpoint import discrete_checkpoint
from toy_dynamics import batch, begin, model, tokens

from hma_gym.dynamics.checkpoint import load_checkpoint, save_checkpoint
from hma_gym.dynamics.mar import DiffusionHeadConfig
from hma_gym.dynamics.model import Dynamics
from hma_gym.errors import CheckpointError, InvalidArgument
from hma_gym.tokenizers.files import load_tokenizer, save_tokenizer
from hma_gym.training.recipes.dynamics import read_initial


@pytest.fixture(scope="module")
def folders(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"soft": toy_folder, "vq": save_checkpoint(discrete_checkpoint(), tmp_path_factory.mktemp("vq") / "toy")}


@pytest.mark.parametrize(("own", "other"), [("soft", "vq"), ("vq", "soft")])
def test_a_folder_with_a_tokenizer_of_the_other_kind(
    own: str, other: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Config, weights and hash of the tokenizer are another checkpoint's, all in order by themselves."""
    folder = Path(shutil.copytree(folders[own], tmp_path / "mixed"))
    weights = "tokenizer.safetensors"
    shutil.copy(folders[other] / weights, folder / weights)
    config = json.loads((folder / "config.json").read_text())
    config["tokenizer"] = json.loads((folders[other] / "config.json").read_text())["tokenizer"]
    config["files"][weights] = hashlib.sha256((folder / weights).read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    text = f"makes '{other}' tokens and the dynamics model needs '{own}' ones; pair a model"
    for load in (load_checkpoint, lambda path: gymnasium.make("HMA-Lift-v0", checkpoint=path)):
        with pytest.raises(CheckpointError, match=text):
            load(folder)


@pytest.mark.parametrize(("own", "other"), [("soft", "vq"), ("vq", "soft")])
def test_a_tokenizer_that_is_asked_for_by_the_other_kind(
    own: str, other: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_tokenizer(load_checkpoint(folders[own]).tokenizer, tmp_path / own)
    with pytest.raises(CheckpointError, match=f"makes '{own}' tokens but its dynamics works on '{other}' ones"):
        load_tokenizer(folder, expect=other)


@pytest.mark.parametrize(("own", "other"), [("soft", "vq"), ("vq", "soft")])
def test_weights_to_start_from_are_of_the_other_kind(own: str, other: str, folders: dict[str, Path]) -> None:
    dynamics = load_checkpoint(folders[own]).dynamics
    with pytest.raises(CheckpointError, match="does not fit this model.*same size, kind of token"):
        read_initial(folders[other]).load(dynamics)


@pytest.mark.parametrize("kind", ["soft", "vq"])
def test_a_rollout_does_not_start_from_other_tokens(kind: str) -> None:
    dynamics = model(kind)
    clip = batch(kind, dynamics, 2, 1)
    other = {"soft": "vq", "vq": "soft"}[kind]
    with pytest.raises(InvalidArgument, match=f"{kind} tokens must be .*; {other} tokens need a {other} tokenizer"):
        begin(dynamics, {**clip, "tokens": tokens(other, 2, 2)})
    with pytest.raises(InvalidArgument, match=f"{kind} tokens must have shape"):
        begin(dynamics, {**clip, "tokens": clip["tokens"][:, :, :8]})


def test_a_flow_head_is_no_diffusion_head(toy_folder: Path, tmp_path: Path) -> None:
    """Of two soft heads the weights may have the same shapes; the configuration tells them apart."""
    soft = load_checkpoint(toy_folder)
    head = soft.dynamics.config.head
    shared = {field.name: getattr(head, field.name) for field in dataclasses.fields(head)}
    config = dataclasses.replace(soft.dynamics.config, head=DiffusionHeadConfig(**{**shared, "flow_steps": 5}))
    dynamics = Dynamics(config, soft.dynamics.domains).requires_grad_(False)
    folder = save_checkpoint(dataclasses.replace(soft, dynamics=dynamics), tmp_path / "diffusion", half=False)
    loaded = load_checkpoint(folder).dynamics
    assert loaded.config == config and loaded.head.kind == "soft"
    state = loaded.start(soft.tokenizer.encode(torch.from_numpy(soft.starts.frames_NHWC)), None, torch.arange(6))
    _, out = loaded.step(state, torch.zeros(6, 7))
    assert torch.isfinite(out.tokens).all()
    config_file = folder / "config.json"
    fields = json.loads(config_file.read_text())
    fields["dynamics"]["head"]["kind"] = "soft"
    config_file.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="FlowHeadConfig must have exactly.*unknown.*train_steps"):
        load_checkpoint(folder)
