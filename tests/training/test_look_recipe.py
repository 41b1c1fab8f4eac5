"""The stage that trains look by itself: what it changes in a checkpoint, what it leaves, how it resumes and refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_dynamics import domain, handling

from hma_gym.data.cache import load_token_cache
from hma_gym.data.episodes import STILL, Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter, open_dataset
from hma_gym.dynamics.body import BodyConfig
from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, start_bank
from hma_gym.dynamics.mar import FlowHeadConfig
from hma_gym.dynamics.maskgit import MaskGITHeadConfig
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.errors import CheckpointError, DatasetError, InvalidArgument, ResumeError, UnknownName
from hma_gym.nn.transformer import TrunkConfig
from hma_gym.tokenizers import SoftConfig, SoftTokenizer, VQConfig, VQTokenizer
from hma_gym.tokenizers.files import load_tokenizer
from hma_gym.tokenizers.protocol import Tokenizer
from hma_gym.tokenizers.standardised import StandardisedTokenizer
from hma_gym.training import TrainResult, read_log
from hma_gym.training.recipes.look import (
    Frames,
    LookBatches,
    LookOptions,
    drawing_bodies,
    evenly,
    make_source,
    pixel_error,
    train_look,
)

SIZE, ROWS = 32, 8
WIDTHS: dict[str, Any] = {"encoder_widths": (4, 8, 16), "decoder_widths": (16, 8, 8), "decoder_blocks": (1, 1, 1)}


def _scene(hands: np.ndarray, things: np.ndarray) -> np.ndarray:
    """(T, SIZE, SIZE, 3): a dark square where the hand is, a red one where the object is."""
    images = np.full((len(hands), SIZE, SIZE, 3), 160, np.uint8)
    for image, hand, thing in zip(images, hands, things, strict=True):
        for place, half, colour in ((thing, 3, (220, 40, 40)), (hand, 4, (30, 30, 60))):
            x, y = np.clip((SIZE / 2 + 100 * place[:2]).astype(int), half, SIZE - half)
            image[y - half : y + half, x - half : x + half] = colour
    return images


def _episode(index: int, still: bool, state_dim: int = 9) -> Episode:
    """A hand that moves over an object that lies; of stills, each row shows another arm and place."""
    rng = np.random.default_rng((index, still))
    hands = rng.uniform(-0.1, 0.1, (ROWS, 3)) if still else np.linspace(*rng.uniform(-0.1, 0.1, (2, 3)), ROWS)
    things = rng.uniform(-0.1, 0.1, (ROWS, 3)) if still else np.repeat(rng.uniform(-0.1, 0.1, (1, 3)), ROWS, axis=0)
    yaw = rng.uniform(-0.5, 0.5, ROWS)
    turned = np.stack((0 * yaw, 0 * yaw, np.sin(yaw / 2), np.cos(yaw / 2)), axis=1)
    fingers = np.repeat([[0.04, -0.04]], ROWS, axis=0)
    agent_pos = np.concatenate((hands, turned, fingers), axis=1).astype(np.float32)[:, :state_dim]
    upright = np.repeat([[0.0, 0.0, 0.0, 1.0]], ROWS, axis=0)
    obs = {"robot0_eef_pos": agent_pos[:, :3], "object": np.concatenate((things, upright), axis=1)}
    return Episode(
        images_THWC=_scene(hands, things),
        agent_pos_TP=agent_pos,
        actions_TA=np.zeros((ROWS, 4), np.float32),
        states_TS=np.zeros((ROWS, 2)),
        rewards_T=np.zeros(ROWS, np.float32),
        dones_T=np.arange(ROWS) == ROWS - 1,
        obs=obs if state_dim >= 7 else {},
        attrs={"category": STILL, STILL: True} if still else {"success": False, "seed": index},
    )


def _dataset(path: Path, episodes: int, still: bool = False, **fields: Any) -> Path:
    writer = EpisodeWriter(path, env_args={"env_name": "Own", "type": 1, "env_kwargs": {}}, info={})
    for index in range(episodes):
        writer.write(index, _episode(index, still, **fields))
    return writer.merge()


def _save(folder: Path, tokenizer: Tokenizer, *domains: Any, half: bool = True) -> Path:
    """A checkpoint whose bodies know the statistics of the tokens of two episodes."""
    grid = {"grid": (4, 4), "patch": 2}
    head: Any = MaskGITHeadConfig(vocabulary=tokenizer.vocabulary, **grid)  # type: ignore[arg-type]
    if tokenizer.kind == "soft":
        head = FlowHeadConfig(channels=tokenizer.channels, flow_width=16, flow_layers=1, flow_steps=2, **grid)  # type: ignore[arg-type]
    body = BodyConfig(history=2, octaves=1, coast_width=16, look_width=16, look_layers=1, sight_width=16)
    trunk = TrunkConfig(layers=1, width=16, heads=2, window=4)
    dynamics = Dynamics(DynamicsConfig(trunk, head, body), domains)
    frames = torch.from_numpy(np.concatenate([_episode(index, still=True).images_THWC for index in range(2)]))
    if isinstance(tokenizer, StandardisedTokenizer):
        tokenizer.set_statistics(frames)
        tokens = tokenizer.encode(frames)
        for index in range(len(domains)):
            dynamics.adapter(index).body.set_token_statistics(tokens.mean(dim=0), tokens.std(dim=0).clamp(min=0.02))
    checkpoint = Checkpoint(
        name="toy",
        task="",
        tokenizer=tokenizer.eval().requires_grad_(False),
        dynamics=dynamics.eval().requires_grad_(False),
        judge=None,
        starts=start_bank([frames[0].numpy()], [np.zeros(9, np.float32)]),
        provenance={"recipe": {"minutes": 1}},
    )
    return save_checkpoint(checkpoint, folder, half=half, card="# Toy\n\nA card.\n")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes, stills, and checkpoints of one domain and of three, of soft tokens and of others."""
    folder = tmp_path_factory.mktemp("material")
    _dataset(folder / "moving.hdf5", 14)
    _dataset(folder / "stills.hdf5", 14, still=True)
    _dataset(folder / "flat.hdf5", 12, state_dim=2)
    hand = dataclasses.replace(handling(), image_size=(SIZE, SIZE), state_mean=(0.0,) * 9)
    flat = dataclasses.replace(domain("flat", actions=4, state=2, targets=0), image_size=(SIZE, SIZE))
    blind = dataclasses.replace(domain("blind", actions=4, state=0, targets=0), image_size=(SIZE, SIZE))
    background = torch.full((SIZE, SIZE, 3), 160, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        soft = SoftTokenizer(SoftConfig((SIZE, SIZE), channels=4, **WIDTHS), background)
        torch.nn.init.normal_(soft.decoder.position, std=0.5)
        _save(folder / "one", soft, hand)
        _save(folder / "full", soft, hand, half=False)
        _save(folder / "several", soft, hand, flat, blind)
        _save(folder / "silent", soft, blind)
        _save(folder / "vq", VQTokenizer(VQConfig((SIZE, SIZE), **WIDTHS), background), hand)
    return folder


def _options(material: Path, out: Path, **fields: Any) -> LookOptions:
    settings: dict[str, Any] = {
        "checkpoint": str(material / "one"),
        "data": (material / "moving.hdf5", material / "stills.hdf5"),
        "steps": 8,
        "frames": 24,
        "pixel_frames": 6,
    }
    return LookOptions(out=out, **{**settings, **fields})


def _changed(before: Path, after: Path, name: str) -> set[str]:
    """Names of the tensors of a file that differ in some bit, or are in one of both only."""
    ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (before, after))
    return {
        key
        for key in ours.keys() | theirs.keys()
        if key not in ours or key not in theirs or ours[key].dtype != theirs[key].dtype
        or not torch.equal(ours[key], theirs[key])
    }  # fmt: skip


# ---------------------------------------------------------------------- what comes out


@pytest.fixture(scope="module")
def trained(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, train_look(_options(material, out, steps=150, frames=48))


def test_it_learns_to_draw(trained: tuple[Path, TrainResult]) -> None:
    out, result = trained
    assert result.finished and result.step == 150
    scores = result.evaluation
    assert {f"{kind}_{key}" for kind in ("valid", "stills") for key in ("look", "psnr")} == scores.keys()
    assert scores["valid_look"] < 0.8 and scores["stills_look"] < 1.0  # untrained it is the mean of all frames: 1
    lines = [line for line in read_log(out / "metrics.jsonl") if line["kind"] == "train"]
    for key in ("loss", "token_loss", "pixel_loss"):
        assert lines[-1][key] < lines[0][key], key


def test_all_else_stays_bit_for_bit(material: Path, trained: tuple[Path, TrainResult]) -> None:
    before, after = material / "one", trained[0] / "checkpoint"
    assert not _changed(before, after, "tokenizer") and not _changed(before, after, "starts")
    changed = _changed(before, after, "dynamics")
    assert changed and all(name.startswith("adapters.hand.body.look.") for name in changed)
    assert (after / "README.md").read_text() == (before / "README.md").read_text()
    was, now = (json.loads((folder / "config.json").read_text()) for folder in (before, after))
    told = now["provenance"].pop("look")
    assert told["steps"] == 150 and told["from"] == load_checkpoint(before).digest
    assert {"checkpoint", "data", "out"}.isdisjoint(told["recipe"]) and told["recipe"]["frames"] == 48
    assert told["validation"] == dict(trained[1].evaluation)
    for config in (was, now):
        config.pop("files")
    assert was == now


def test_weights_in_full_precision_stay_so(material: Path, tmp_path: Path) -> None:
    train_look(_options(material, tmp_path / "run", checkpoint=str(material / "full"), steps=2))
    before, after = material / "full", tmp_path / "run" / "checkpoint"
    assert not _changed(before, after, "tokenizer")
    assert all(".body.look." in name for name in _changed(before, after, "dynamics"))


def test_it_goes_on_from_what_the_checkpoint_draws(
    material: Path, trained: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    again = train_look(
        _options(material, tmp_path / "run", checkpoint=str(trained[0] / "checkpoint"), steps=1, lr=1e-9)
    )
    for key, value in trained[1].evaluation.items():
        assert again.evaluation[key] == pytest.approx(value, rel=0.02), key


def test_another_size_begins_anew_but_for_where_things_are(
    material: Path, trained: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    source = trained[0] / "checkpoint"
    out = tmp_path / "run"
    result = train_look(_options(material, out, checkpoint=str(source), steps=1, lr=1e-9, width=24, layers=2))
    was, loaded = load_checkpoint(source), load_checkpoint(out / "checkpoint")
    config = loaded.dynamics.config.body
    assert (config.look_width, config.look_layers) == (24, 2)
    assert dataclasses.replace(config, look_width=16, look_layers=1) == was.dynamics.config.body
    assert result.evaluation["valid_look"] > trained[1].evaluation["valid_look"] + 0.1
    had, has = was.dynamics.state_dict(), loaded.dynamics.state_dict()
    for name, tensor in had.items():
        if ".look." not in name:
            assert torch.equal(has[name], tensor), name
    for name in ("reach", "robot_anchors.straight.weight", "object_anchors.bent.2.bias"):
        torch.testing.assert_close(has[f"adapters.hand.body.look.{name}"], had[f"adapters.hand.body.look.{name}"])


def test_the_decoder_learns_with_it_and_codes_stay(material: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "run", material / "one"
    result = train_look(_options(material, out, decoder=True, steps=60, images=80, pixel_frames=24, lr=1e-2))
    keys = ("look", "psnr", "true_psnr", "decoder_psnr")
    assert {f"{kind}_{key}" for kind in ("valid", "stills") for key in keys} == result.evaluation.keys()
    changed = _changed(before, out / "checkpoint", "tokenizer")
    assert changed and all(name.startswith(("decoder.", "background")) for name in changed)
    assert all(".body.look." in name for name in _changed(before, out / "checkpoint", "dynamics"))
    old, new = (load_checkpoint(folder).tokenizer for folder in (before, out / "checkpoint"))
    frames = torch.from_numpy(_episode(5, still=True).images_THWC)
    assert torch.equal(old.encode(frames), new.encode(frames))

    def wrong(tokenizer: Tokenizer) -> float:
        return float((tokenizer.decode(tokenizer.encode(frames)).float() - frames).square().mean())

    assert wrong(new) < 0.9 * wrong(old)
    saved = load_tokenizer(out / "tokenizer")
    torch.testing.assert_close(saved.decode(saved.encode(frames)), new.decode(new.encode(frames)), atol=2, rtol=0)


def test_without_pixels_only_tokens_count(material: Path, tmp_path: Path) -> None:
    train_look(_options(material, tmp_path / "none", pixel_weight=0.0))
    (line,) = [line for line in read_log(tmp_path / "none" / "metrics.jsonl") if line["kind"] == "train"]
    assert "pixel_loss" not in line and line["loss"] == pytest.approx(line["token_loss"])


def test_domains_without_data_stay(material: Path, tmp_path: Path) -> None:
    before = material / "several"
    fields: dict[str, Any] = {"checkpoint": str(before), "steps": 2}
    train_look(_options(material, tmp_path / "one", data=(material / "flat.hdf5",), **fields))
    assert all(name.startswith("adapters.flat.") for name in _changed(before, tmp_path / "one/checkpoint", "dynamics"))
    data = (material / "moving.hdf5", material / "flat.hdf5", material / "stills.hdf5")
    both = train_look(
        _options(material, tmp_path / "two", data=data, names=("hand", "flat", "hand"), width=24, **fields)
    )
    assert {"hand/valid_look", "hand/stills_psnr", "flat/valid_look"} <= both.evaluation.keys()
    assert "flat/stills_look" not in both.evaluation
    assert load_checkpoint(tmp_path / "two" / "checkpoint").dynamics.config.body.look_width == 24


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("decoder", [False, True])
def test_interrupted_equals_uninterrupted(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: bool
) -> None:
    whole, parts, stops = tmp_path / "whole", tmp_path / "parts", [1, 4, 7]
    assert train_look(_options(material, whole, decoder=decoder)).finished
    original = LookBatches.batch

    def interrupted(self: LookBatches, step: int) -> dict[str, torch.Tensor]:
        if step + 1 in stops:
            stops.remove(step + 1)
            signal.raise_signal(signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(LookBatches, "batch", interrupted)
    assert [train_look(_options(material, parts, decoder=decoder)).step for _ in range(4)] == [1, 4, 7, 8]
    for name in ("dynamics", "tokenizer"):
        assert not _changed(whole / "checkpoint", parts / "checkpoint", name)


def test_another_run_is_not_resumed(material: Path, tmp_path: Path) -> None:
    train_look(_options(material, tmp_path, steps=1))
    with pytest.raises(ResumeError, match="still_share"):
        train_look(_options(material, tmp_path, steps=1, still_share=0.2))
    other = shutil.copytree(material / "one", tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text().replace('"toy"', '"other"'))
    with pytest.raises(ResumeError, match="checkpoint"):
        train_look(_options(material, tmp_path, steps=1, checkpoint=str(other)))
    fewer = _dataset(tmp_path / "fewer.hdf5", 3, still=True)
    (tmp_path / "hand-2.tokens.h5").unlink()
    with pytest.raises(ResumeError, match="data.hand"):
        train_look(_options(material, tmp_path, steps=1, data=(material / "moving.hdf5", fewer)))


# ---------------------------------------------------------------------- what is drawn from


def _batches(material: Path, out: Path, **fields: Any) -> LookBatches:
    options = _options(material, out, **fields)
    checkpoint = load_checkpoint(options.checkpoint)
    files = [open_dataset(path) for path in options.data]
    source = make_source("hand", files, drawing_bodies(checkpoint)["hand"], checkpoint.tokenizer, options)
    return LookBatches({"hand": source}, options)


def test_batches_are_single_frames_of_the_kinds_asked_for(material: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"frames": 400, "pixel_frames": 100, "still_share": 0.3, "first_share": 0.25}
    batches = _batches(material, tmp_path, disturbed=0.5, disturbance=0.2, **fields)
    source = batches.sources["hand"]
    batch = batches.batch(3)
    assert batch["hand/tokens"].shape == (400, 16, 4) and batch["hand/targets"].shape == (400, 9)
    rows = _rows_of(source.cache.tokens, batch["hand/tokens"].numpy())
    for part in (slice(100), slice(100, 400)):  # both have the shares
        counts = [np.isin(rows[part], own).mean() for own in (source.train.stills, source.train.moving)]
        assert counts == pytest.approx([0.3, 0.7])
        first = np.isin(rows[part], source.train.first).sum()
        assert 0.25 * 0.7 <= first / len(rows[part]) < 0.4
    cache = source.cache
    np.testing.assert_array_equal(batch["hand/targets"].numpy(), cache.targets_FX[rows])
    moved = (batch["hand/agent_pos"].numpy() != cache.agent_pos_FP[rows]).any(axis=1)
    assert not moved[np.isin(rows, source.train.moving)].any()
    assert 0.3 < moved[np.isin(rows, source.train.stills)].mean() < 0.7
    away = (batch["hand/agent_pos"].numpy() - cache.agent_pos_FP[rows]) / source.std_P
    assert 0.05 < away[moved][:, :3].std() < 0.2
    turned = batch["hand/agent_pos"][:, 3:7].norm(dim=-1)
    torch.testing.assert_close(turned, torch.ones_like(turned), atol=1e-4, rtol=0)
    for name, value in batches.batch(3).items():
        assert torch.equal(value, batch[name])
    assert not torch.equal(batches.batch(4)["hand/tokens"], batch["hand/tokens"])


def _rows_of(tokens_FSC: np.ndarray, drawn_MSC: np.ndarray) -> np.ndarray:
    known = {row.tobytes(): index for index, row in enumerate(tokens_FSC)}
    return np.array([known[row.tobytes()] for row in drawn_MSC])


@pytest.mark.parametrize("data", ["moving", "stills"])
def test_data_of_one_kind_gives_all_frames(material: Path, tmp_path: Path, data: str) -> None:
    batches = _batches(material, tmp_path, data=(material / f"{data}.hdf5",), disturbed=1.0)
    batch, source = batches.batch(0), batches.sources["hand"]
    assert len(batch["hand/tokens"]) == 24 and not len(source.train.stills if data == "moving" else source.train.moving)


def test_images_are_those_of_the_frames_and_no_more_than_asked_for(material: Path, tmp_path: Path) -> None:
    batches = _batches(material, tmp_path, decoder=True, images=40, frames=30, pixel_frames=20)
    source = batches.sources["hand"]
    assert source.pictures is not None and len(source.pictured) == 40
    assert len(source.pictures.images_KHWC) == 40 + len(source.valid)
    batch = batches.batch(0)
    tokenizer = load_checkpoint(batches.options.checkpoint).tokenizer
    torch.testing.assert_close(
        tokenizer.encode(batch["hand/images"]), batch["hand/tokens"][:20].float(), atol=5e-3, rtol=5e-3
    )


def test_frames_are_spread_evenly() -> None:
    assert evenly(np.arange(10), 3).tolist() == [0, 4, 9] and evenly(np.arange(2), 5).tolist() == [0, 1]
    assert evenly(np.zeros(0, np.int64), 5).tolist() == []


def test_held_out_frames_are_of_the_valid_split(material: Path, tmp_path: Path) -> None:
    source = _batches(material, tmp_path).sources["hand"]
    cache = load_token_cache(tmp_path / "hand.tokens.h5")
    valid = Frames.of(cache, "valid")
    assert set(valid.moving) <= set(source.valid.moving) and len(source.valid.stills)
    assert not set(source.valid.rows()) & set(source.train.rows())


# ---------------------------------------------------------------------- the loss


def test_pixel_error_is_a_little_absolute_and_squared() -> None:
    wanted = torch.zeros(1, 3, 2, 2)
    assert float(pixel_error(wanted, wanted)) == pytest.approx(0.0, abs=1e-7)
    assert float(pixel_error(wanted + 0.5, wanted)) == pytest.approx(0.3 * ((0.25 + 1e-4) ** 0.5 - 0.01) + 0.25)


def test_gradients_of_pixels_reach_what_is_drawn(material: Path) -> None:
    tokenizer = load_checkpoint(material / "one").tokenizer
    assert isinstance(tokenizer, SoftTokenizer)
    tokens = tokenizer.encode(torch.from_numpy(_episode(0, still=True).images_THWC)).requires_grad_()
    images = tokenizer.tokens_to_images(tokens)
    assert torch.equal(tokenizer.to_frames(images), tokenizer.decode(tokens))
    images.square().mean().backward()  # type: ignore[no-untyped-call]
    assert tokens.grad is not None and bool((tokens.grad != 0).any())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": ()}, "data must name one or more"),
        ({"names": ("hand",)}, "names must be one a dataset"),
        ({"frames": 0}, "frames must be 1 or more, got 0"),
        ({"width": -1}, "width must be 0 or more, got -1"),
        ({"still_share": 1.5}, r"still_share must be a share in \[0, 1\], got 1.5"),
        ({"disturbed": -0.1}, "disturbed must be a share"),
        ({"disturbance": -1.0}, "disturbance must be 0 or more"),
        ({"pixel_weight": float("nan")}, "pixel_weight must be 0 or more, got nan"),
        ({"pixel_frames": 25}, "pixel_frames must be at most frames, got 25 of 24"),
        ({"decoder": True, "pixel_weight": 0.0}, "decoder learns from pixels"),
        ({"decoder": True, "pixel_frames": 0}, "decoder learns from pixels"),
    ],
)
def test_options_that_break_a_rule_are_refused(material: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        _options(material, material / "run", **fields)


def test_checkpoints_that_do_not_fit_are_refused(material: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], message: str, **fields: Any) -> None:
        with pytest.raises(error, match=message):
            train_look(_options(material, tmp_path / "run", **fields))

    refused(InvalidArgument, "must have soft tokens", checkpoint=str(material / "vq"))
    refused(InvalidArgument, "body draws", checkpoint=str(material / "silent"))
    refused(CheckpointError, "checkpoint must be", checkpoint="nowhere")
    refused(UnknownName, "domain 'arm'", names=("arm", "arm"))
    several = str(material / "several")
    refused(UnknownName, "moving|stills", checkpoint=several)
    refused(InvalidArgument, "data must be of", checkpoint=several, names=("hand", "hand"), width=24)
    shutil.copytree(material / "one", tmp_path / "run" / "checkpoint")
    refused(InvalidArgument, "out must be another folder", checkpoint=str(tmp_path / "run" / "checkpoint"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: _dataset(folder / "flat.hdf5", 2, state_dim=2), "agent_pos of 9 dims"),
        (lambda folder: _blind(folder), "must have images"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    material: Path, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        train_look(_options(material, tmp_path / "run", data=(make(tmp_path),)))


def _blind(folder: Path) -> Path:
    writer = EpisodeWriter(folder / "blind.hdf5", env_args={}, info={})
    episode = _episode(0, still=False)
    writer.append(dataclasses.replace(episode, images_THWC=episode.images_THWC[:, :0, :0]))
    return writer.merge()


def test_pixels_need_a_decoder_that_learns(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(StandardisedTokenizer):
        """Another soft tokenizer, as published ones are."""

    monkeypatch.setattr("hma_gym.training.recipes.look.SoftTokenizer", Other)
    with pytest.raises(InvalidArgument, match="pixel_weight must be 0 where the tokenizer is no SoftTokenizer"):
        train_look(_options(material, tmp_path / "run"))
    assert train_look(_options(material, tmp_path / "run", pixel_weight=0.0, steps=1)).finished
