"""Published weights: logits as the reference gives them, a cache that changes nothing, and refusals by name.

The fixture is the reference's own output at a reduced size (``record_published.py`` says how it was made). With
``HMA_REFERENCE`` naming a checkout of the reference, the comparison runs at the size of the paper's Base too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import replay_on_the_host
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hma_gym.benchmarks._reference import PUBLISHED_FIELDS, load_reference, random_reference
from hma_gym.dynamics.published import PublishedGraphs, PublishedModel, PublishedState, load_published, read_published
from hma_gym.errors import CheckpointError, InvalidAction, InvalidArgument
from hma_gym.nn.precision import in_precision

FIXTURE = Path(__file__).with_name("published.safetensors")
BASE = {"num_layers": 32, "num_heads": 8, "d_model": 256, "T": 12, "S": 256, "image_vocab_size": 2**18}
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, inputs and outputs, configuration."""
    with safe_open(FIXTURE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    return weights, {name: t for name, t in tensors.items() if not name.startswith("weights.")}, config


@pytest.fixture(scope="module")
def model(recorded: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]) -> PublishedModel:
    return read_published(recorded[0], recorded[2], "arm")


def test_logits_equal_the_recorded_ones(model: PublishedModel, recorded: Any) -> None:
    data = recorded[1]
    assert float(data["logits"].std()) > 0.5
    logits = model.logits(data["tokens"], data["masked"], data["actions"])
    torch.testing.assert_close(logits, data["logits"], **TOLERANCE)


@pytest.mark.skipif("HMA_REFERENCE" not in os.environ, reason="HMA_REFERENCE names no checkout of the reference")
def test_logits_equal_those_of_the_reference_at_the_size_of_base() -> None:
    theirs = random_reference(load_reference(os.environ["HMA_REFERENCE"], "plain"), BASE, "arm", 7, seed=0)
    ours = read_published(theirs.state_dict(), {**PUBLISHED_FIELDS, **BASE}, "arm")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2**18, (1, 12, 256), generator=generator)
    masked = torch.zeros(1, 12, 256, dtype=torch.bool)
    masked[:, -1] = True
    actions = torch.randn(1, 12, 7, generator=generator)
    hidden = torch.where(masked, 2**18, tokens).view(1, 12, 16, 16)
    with torch.no_grad():
        wanted, _ = theirs.compute_logits(hidden, action_ids=actions, domain=["arm"])
    wanted = wanted.permute(0, 2, 3, 4, 1).flatten(2, 3)
    torch.testing.assert_close(ours.logits(tokens, masked, actions), wanted, **TOLERANCE)


def _prompt(model: PublishedModel, rows: int, frames: int, keep: int | None = None) -> tuple[PublishedState, Tensor]:
    """Rollouts that were given ``frames`` real frames, and the (raw) actions of a longer run."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(64, (rows, frames, 16), generator=generator)
    actions = torch.randn(rows, frames + 12, 3, generator=generator)
    device = model.position_embedding.device
    tokens, actions = tokens.to(device), actions.to(device)
    state = model.start(tokens[:, 0], torch.arange(rows), keep)
    for t in range(1, frames):
        state = model.observe(state, actions[:, t - 1], tokens[:, t])
    return state, actions


def _uncached(model: PublishedModel, state: PublishedState, action: Tensor) -> Tensor:
    """First-pass logits of the next frame by the whole context, from what the state says it is."""
    frames = state.filled if state.filled < model.config.trunk.window else state.keep
    tokens = torch.cat((state.tokens_BWS[:, -frames:], torch.zeros_like(state.tokens_BS)[:, None]), dim=1)
    masked = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    masked[:, -1] = True
    raw = state.actions_BWA[:, -frames:-1] * model.action_std + model.action_mean
    actions = torch.cat((raw, action[:, None], action[:, None]), dim=1)
    return model.logits(tokens, masked, actions)[:, -1]


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_cached_equals_uncached_while_the_window_slides(model: PublishedModel, keep: int, in_place: bool) -> None:
    state, actions = _prompt(model, 2, 2, keep)
    filled = []
    for t in range(10):
        action = actions[:, 1 + t]
        wanted = _uncached(model, state, action)
        state, first = model.step(state, action, in_place=in_place)
        torch.testing.assert_close(first, wanted, **TOLERANCE)
        filled.append(state.filled)
    assert max(filled) == 4 and min(filled[2:]) == keep + 1  # the window fills, and is emptied down to keep


def _assert_recorded_frames_equal(model: PublishedModel, keep: int, recorded: PublishedGraphs) -> None:
    """Two runs one after the other, and a third beside the second, from another step on."""
    device = model.position_embedding.device
    for run in range(2):
        (plain, actions), (ours, _) = (_prompt(model, 2, 2, keep) for _ in range(2))
        beside, plain_beside = _prompt(model, 2, 3, keep)[0], _prompt(model, 2, 3, keep)[0]
        for t in range(9):
            action = actions[:, 1 + t]
            plain, wanted = model.step(plain, action)
            ours, first = recorded.step(ours, action)
            torch.testing.assert_close(first, wanted, **TOLERANCE)
            assert torch.equal(ours.tokens_BWS, plain.tokens_BWS) and (ours.filled, ours.step) == (plain.filled, t + 2)
            if run:
                plain_beside, _ = model.step(plain_beside, -action)
                beside, _ = recorded.step(beside, -action)
                assert torch.equal(beside.tokens_BWS, plain_beside.tokens_BWS)
        assert device == ours.tokens_BWS.device


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_recorded_frames_equal_plain_ones(model: PublishedModel, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = replay_on_the_host(monkeypatch)
    _assert_recorded_frames_equal(_with_temperature(model, 1.0), keep, PublishedGraphs(_with_temperature(model, 1.0)))
    assert len(found) == 4  # two memories, each with a graph that slides and one that does not


@pytest.mark.gpu
def test_on_a_gpu_cached_frames_equal_uncached_and_recorded_ones(model: PublishedModel) -> None:
    model = copy.deepcopy(model).to("cuda")
    for keep in (1, 3):
        _assert_recorded_frames_equal(model, keep, PublishedGraphs(model))
        state, actions = _prompt(model, 2, 2, keep)
        for t in range(6):
            wanted = _uncached(model, state, actions[:, 1 + t])
            state, first = model.step(state, actions[:, 1 + t])
            torch.testing.assert_close(first, wanted, **TOLERANCE)


@pytest.mark.gpu
def test_on_a_gpu_compiled_and_recorded_frames_equal_plain_ones(model: PublishedModel) -> None:
    model = copy.deepcopy(model).to("cuda")
    fast = copy.deepcopy(model)
    fast.compile_step()
    _assert_recorded_frames_equal(model, 2, PublishedGraphs(fast))


def test_compiled_frames_equal_plain_ones(model: PublishedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    fast = copy.deepcopy(model)
    fast.compile_step()
    (plain, actions), (state, _) = (_prompt(model, 2, 2) for _ in range(2))
    for t in range(5):
        plain, wanted = model.step(plain, actions[:, 1 + t])
        state, first = fast.step(state, actions[:, 1 + t], in_place=True)
        torch.testing.assert_close(first, wanted, **TOLERANCE)
        assert torch.equal(state.tokens_BS, plain.tokens_BS)


def test_published_graphs_need_a_gpu(model: PublishedModel) -> None:
    with pytest.raises(InvalidArgument, match="weights on the device 'cpu'"):
        PublishedGraphs(model)


def test_an_action_shows_in_the_next_frame(model: PublishedModel) -> None:
    state, actions = _prompt(model, 1, 2)
    _, first = model.step(state, actions[:, 1])
    _, other = model.step(state, actions[:, 1] + 1.0)
    assert float((first - other).abs().max()) > 1e-2


def test_a_row_does_not_depend_on_its_neighbours(model: PublishedModel) -> None:
    model = _with_temperature(model, 1.0)
    state, actions = _prompt(model, 3, 3)
    index = torch.tensor([2, 0])
    picked = state.select(index)
    for t in range(4):
        state, _ = model.step(state, actions[:, 2 + t])
        picked, _ = model.step(picked, actions[index, 2 + t])
    assert torch.equal(picked.tokens_BS, state.tokens_BS[index])
    assert not torch.equal(state.tokens_BS[0], state.tokens_BS[1])


def _with_temperature(model: PublishedModel, temperature: float) -> PublishedModel:
    twin = PublishedModel(dataclasses.replace(model.config, temperature=temperature))
    twin.load_state_dict(model.state_dict())
    return twin.eval().requires_grad_(False)


def test_bfloat16_products_stay_near(model: PublishedModel, recorded: Any) -> None:
    data = recorded[1]
    low = in_precision(model, "bfloat16")
    assert low.trunk.blocks[0].up.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    logits = low.logits(data["tokens"], data["masked"], data["actions"])
    error = (logits - data["logits"]).abs().max() / data["logits"].abs().max()
    assert logits.dtype == torch.float32 and 0 < float(error) < 0.05
    assert in_precision(model, "float32") is model


def test_a_folder_of_the_hub_is_read(model: PublishedModel, recorded: Any, tmp_path: Path) -> None:
    weights, data, config = recorded
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_published(tmp_path, "arm")
    assert loaded.config == model.config
    torch.testing.assert_close(
        loaded.logits(data["tokens"], data["masked"], data["actions"]), data["logits"], **TOLERANCE
    )


def test_other_domains_are_left_and_anything_else_is_refused(recorded: Any, tmp_path: Path) -> None:
    weights, _, config = recorded
    other = {name.replace("arm", "leg"): tensor for name, tensor in weights.items()}
    both = read_published({**other, **weights}, config, "arm")
    assert sum(p.numel() for p in both.parameters()) == sum(
        p.numel() for p in read_published(weights, config, "arm").parameters()
    )
    with pytest.raises(CheckpointError, match=r"\['arm'\], got 'hand'"):
        read_published(weights, config, "hand")
    with pytest.raises(CheckpointError, match="qk_norm"):
        read_published(weights, {**config, "qk_norm": True}, "arm")
    with pytest.raises(CheckpointError, match="surprise"):
        read_published({**weights, "surprise": torch.zeros(1)}, config, "arm")
    with pytest.raises(CheckpointError, match="lack the tensor 'out_x_proj.bias'"):
        read_published({n: t for n, t in weights.items() if n != "out_x_proj.bias"}, config, "arm")
    with pytest.raises(CheckpointError, match="do not fit their configuration"):
        read_published(weights, {**config, "T": 5}, "arm")
    with pytest.raises(CheckpointError, match=r"must hold config.json and model.safetensors"):
        load_published(tmp_path, "arm")


def test_arguments_are_checked(model: PublishedModel) -> None:
    state, actions = _prompt(model, 2, 2)
    with pytest.raises(InvalidAction, match=r"\(2, 3\).*got \(1, 3\)"):
        model.step(state, actions[:1, 0])
    with pytest.raises(InvalidArgument, match=r"1\.\.3.*got 4"):
        model.start(state.tokens_BS, torch.arange(2), keep=4)
    with pytest.raises(InvalidArgument, match="decode_steps=0"):
        dataclasses.replace(model.config, decode_steps=0)
