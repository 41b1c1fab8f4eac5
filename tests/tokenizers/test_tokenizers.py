"""The tokenizers' contract: shapes, errors, determinism, locality, statistics, files, training."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from hma_gym.errors import CheckpointError, DatasetError, InvalidArgument, InvalidImage
from hma_gym.nn.vocabulary import split_factors
from hma_gym.tokenizers import SoftConfig, SoftTokenizer, VQConfig, VQTokenizer, build_tokenizer
from hma_gym.tokenizers.files import load_tokenizer, save_tokenizer
from hma_gym.tokenizers.loss import LossConfig, focus_mask, pixel_weights, reconstruction_loss
from hma_gym.tokenizers.quality import measure_quality
from hma_gym.training.recipes.tokenizer import (
    RECIPES,
    FrameBatches,
    TokenizerOptions,
    TokenizerTraining,
    median_frame,
    new_tokenizer,
)

SMALL = {"encoder_widths": (8, 12, 16), "decoder_widths": (16, 12, 8), "decoder_blocks": (1, 1, 0)}
SOFT = SoftConfig(channels=4, **SMALL)
VQ = VQConfig(levels=(4, 3, 5), vocabulary=(12, 5), **SMALL)
BOTH = pytest.mark.parametrize("config", [SOFT, VQ], ids=["soft", "vq"])


BACKGROUND = np.random.default_rng(99).integers(90, 160, (128, 64, 1), dtype=np.uint8).repeat(3, axis=-1)


def episodes(count=4, rows=6, size=(64, 64), seed=0):
    """A red square that moves over a fixed grey texture."""
    rng = np.random.default_rng(seed)
    background = BACKGROUND[: size[0], : size[1]]
    made = []
    for _ in range(count):
        images = np.repeat(background[None], rows, axis=0)
        top, left = rng.integers(4, 40, 2)
        for row in range(rows):
            images[row, top + row : top + row + 8, left : left + 8] = (220, 20, 30)
        made.append(images)
    return made


@pytest.fixture(scope="module")
def frames():
    return torch.from_numpy(np.concatenate(episodes()))


def make(config):
    torch.manual_seed(0)
    return new_tokenizer(config, median_frame(episodes(size=config.image_size))).eval()


@BOTH
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_shapes_for_any_leading_dims(config, leading, frames):
    tokenizer = make(config)
    images = frames[:1].expand(6, -1, -1, -1)[: int(np.prod(leading))].reshape(*leading, 64, 64, 3)
    tokens = tokenizer.encode(images)
    assert tokenizer.grid == (8, 8) and tokenizer.tokens_per_frame == 64
    if config.kind == "soft":
        assert tokens.shape == (*leading, 64, 4) and tokens.is_floating_point() and tokenizer.vocabulary == ()
    else:
        assert tokens.shape == (*leading, 64) and tokens.dtype == torch.int64 and tokenizer.channels == 0
        assert 0 <= int(tokens.min()) and int(tokens.max()) < 60
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape and decoded.dtype == torch.uint8
    assert not tokens.requires_grad


@BOTH
def test_other_image_sizes(config):
    tokenizer = make(dataclasses.replace(config, image_size=(128, 64)))
    images = torch.randint(256, (2, 128, 64, 3), dtype=torch.uint8)
    tokens = tokenizer.encode(images)
    assert tokenizer.grid == (16, 8) and tokens.shape[:2] == (2, 128)
    assert tokenizer.decode(tokens).shape == images.shape


def test_image_size_must_be_divisible():
    with pytest.raises(InvalidArgument, match=r"divisible by 8.*\(84, 84\).*80 or 88"):
        SoftConfig(image_size=(84, 84))


@BOTH
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 64, 64, 3), "uint8.*float32"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "shape"),
        (torch.zeros(2, 32, 64, 3, dtype=torch.uint8), "64, 64, 3"),
        (torch.zeros(64, 64, dtype=torch.uint8), "shape"),
        (np.zeros((2, 64, 64, 3), np.uint8), "torch.from_numpy"),
    ],
)
def test_wrong_frames_are_refused(config, bad, message):
    with pytest.raises(InvalidImage, match=message):
        make(config).encode(bad)


def test_wrong_tokens_are_refused():
    soft, vq = make(SOFT), make(VQ)
    with pytest.raises(InvalidArgument, match="vq tokenizer"):
        soft.decode(torch.zeros(2, 64, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match=r"64, 4"):
        soft.decode(torch.zeros(2, 64, 5))
    with pytest.raises(InvalidArgument, match="soft tokenizer"):
        vq.decode(torch.zeros(2, 64, 4))
    with pytest.raises(InvalidArgument, match="64"):
        vq.decode(torch.zeros(2, 63, dtype=torch.int64))


@BOTH
def test_deterministic_and_alone_in_the_batch(config, frames):
    tokenizer = make(config)
    tokens = tokenizer.encode(frames[:4])
    assert torch.equal(tokens, tokenizer.encode(frames[:4]))
    others = torch.cat([frames[:1], 255 - frames[5:8]])
    assert torch.equal(tokenizer.encode(others)[0], tokens[0])
    assert torch.equal(tokenizer.decode(tokens)[0], tokenizer.decode(tokenizer.encode(others))[0])
    if config.kind == "soft":
        torch.testing.assert_close(tokenizer.encode(frames[0]), tokens[0], atol=1e-4, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("leading", [(7,), (2, 4)])
def test_frames_decoded_a_few_at_a_time_are_the_frames(config, leading, frames, monkeypatch):
    tokenizer = make(config)
    tokens = tokenizer.encode(frames[: int(np.prod(leading))]).unflatten(0, leading)
    whole = tokenizer.decode(tokens)
    sizes = []
    before = tokenizer.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr("hma_gym.tokenizers.conv._WIDEST", 3 * 4 * 64 * 64 * 4)  # three frames of four maps
    parts = tokenizer.decode(tokens)
    before.remove()
    assert sizes == {7: [3, 3, 1], 8: [3, 3, 2]}[int(np.prod(leading))]
    assert parts.shape == whole.shape and parts.dtype == torch.uint8
    assert torch.equal(parts, whole) or int((parts.int() - whole.int()).abs().max()) <= 1


@BOTH
def test_a_token_sees_only_its_neighbourhood(config, frames):
    """Receptive field of 32 pixels: 12 around the 8 x 8 patch, so tokens 2 or more patches away do not notice."""
    tokenizer = make(config)
    changed = frames[0].clone()
    changed[32:40, 32:40] = 255 - changed[32:40, 32:40]  # the patch of token (4, 4)
    before, after = tokenizer.encode(torch.stack([frames[0], changed])).unflatten(1, (8, 8))
    differs = before != after if config.kind == "vq" else (before != after).any(-1)
    far = torch.ones(8, 8, dtype=torch.bool)
    far[2:7, 2:7] = False
    assert not bool(differs[far].any())
    if config.kind == "soft":
        assert bool(differs[4, 4])


def test_training_noise_only_in_training(frames):
    tokenizer = make(SOFT)
    images = tokenizer.to_images(frames[:2])
    assert torch.equal(tokenizer.reconstruct(images), tokenizer.reconstruct(images))
    tokenizer.train()
    noisy = [tokenizer.reconstruct(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])


def test_statistics_standardise_the_tokens(frames):
    tokenizer = make(SOFT)
    decoded = tokenizer.decode(tokenizer.encode(frames))
    tokenizer.set_statistics(frames, chunk=7)
    tokens = tokenizer.encode(frames)
    torch.testing.assert_close(tokens.mean((0, 1)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(tokens.std((0, 1)), torch.ones(4), atol=1e-2, rtol=0)
    assert int((tokenizer.decode(tokens).int() - decoded.int()).abs().max()) <= 1
    torch.nn.init.zeros_(tokenizer.encoder.layers[-1].weight)
    with pytest.raises(InvalidArgument, match="vary"):
        tokenizer.set_statistics(frames)


def test_vq_tokens_are_the_levels_in_mixed_radix(frames):
    tokenizer = make(VQ)
    codes, tokens = tokenizer._quantize(tokenizer.to_images(frames[:3]))
    half = torch.tensor(VQ.levels) // 2
    levels = (codes * half + half).round().long()
    assert torch.equal(split_factors(tokens, VQ.levels), levels)
    images = tokenizer.from_latents(codes.transpose(1, 2).unflatten(2, (8, 8)))
    assert torch.equal(tokenizer.decode(tokens), tokenizer.to_frames(images))


def test_vq_config_rules():
    with pytest.raises(InvalidArgument, match="1000 codes"):
        VQConfig(vocabulary=(10, 10))
    with pytest.raises(InvalidArgument, match="at least 3"):
        VQConfig(levels=(2, 500))


@BOTH
def test_config_round_trip_and_unknown_keys(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(values) == config
    assert build_tokenizer(values).config == config
    with pytest.raises(CheckpointError, match="unknown.*colour"):
        build_tokenizer({**values, "colour": 1})
    values.pop("image_size")
    with pytest.raises(CheckpointError, match="missing.*image_size"):
        build_tokenizer(values)


def test_the_wrong_kind_is_refused():
    with pytest.raises(CheckpointError, match="'vq'.*'soft'"):
        build_tokenizer(VQ.to_dict(), expect="soft")
    with pytest.raises(CheckpointError, match="'vq'.*'soft'"):
        SoftConfig.from_dict(VQ.to_dict())
    with pytest.raises(CheckpointError, match="kind.*'video'"):
        build_tokenizer({"kind": "video"})


@BOTH
def test_save_and_load(config, frames, tmp_path):
    tokenizer = make(config)
    if isinstance(tokenizer, SoftTokenizer):
        tokenizer.set_statistics(frames)
    save_tokenizer(tokenizer, tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t", expect=config.kind)
    assert type(loaded) is type(tokenizer) and not loaded.training
    assert torch.equal(loaded.encode(frames[:4]), tokenizer.encode(frames[:4]))
    weights = tmp_path / "t" / "tokenizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(tmp_path / "t")
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_tokenizer(tmp_path / "t")


def test_weights_of_another_tokenizer_are_refused(tmp_path):
    save_tokenizer(make(SOFT), tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text(json.dumps(VQ.to_dict()))
    with pytest.raises(CheckpointError, match="do not fit the vq tokenizer"):
        load_tokenizer(tmp_path / "t")


def test_default_sizes_stay_small():
    for tokenizer in (SoftTokenizer(SoftConfig()), VQTokenizer(VQConfig())):
        assert sum(p.numel() for p in tokenizer.parameters()) * 2 < 4e6  # bytes in fp16


@BOTH
def test_training_lowers_the_loss(config, frames):
    torch.manual_seed(0)
    model = TokenizerTraining(make(config), LossConfig(focus_colour=(1.0, 0.0, 0.0))).train()
    batches = FrameBatches(episodes(), batch_size=8)
    optimizer = torch.optim.Adam([p for group in model.parameter_groups() for p in group.parameters], lr=5e-3)
    losses = []
    for step in range(20):
        loss, metrics = model.loss(batches.batch(step), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0] and metrics["psnr"].ndim == 0
    assert {id(p) for group in model.parameter_groups() for p in group.parameters} == {
        id(p) for p in model.parameters()
    }


def test_quality_figures(frames):
    background = torch.from_numpy(median_frame(episodes()))
    parts = [torch.from_numpy(images) for images in episodes(count=2)]
    soft = measure_quality(make(SOFT), parts, background, (1.0, 0.0, 0.0))
    vq = measure_quality(make(VQ), parts, background)
    assert soft["psnr_noise_0.2"] <= soft["psnr"] + 0.1 and soft["focus_psnr"] < soft["psnr"]
    assert "focus_psnr" not in vq and 0 < vq["tokens_changed"] < 0.6 and 0 < vq["codes_used"] <= 1
    assert 1 <= vq["code_perplexity"] <= 60


def test_pixels_that_matter_weigh_more():
    first, second = (torch.from_numpy(episodes()[0][row : row + 1]).permute(0, 3, 1, 2).float() / 255 for row in (0, 1))
    background = torch.from_numpy(BACKGROUND[:64]).permute(2, 0, 1).float() / 255
    config = LossConfig(foreground=2.0, change=4.0, focus=8.0, focus_colour=(1.0, 0.0, 0.0))
    weights = pixel_weights(first, second, background, config)
    assert set(weights.unique().tolist()) == {1.0, 5.0, 11.0, 15.0}
    assert int(focus_mask(first, (1.0, 0.0, 0.0)).sum()) == 64
    in_focus, elsewhere = first.clone(), first.clone()
    in_focus[:, 0][focus_mask(first, (1.0, 0.0, 0.0))] -= 0.3
    elsewhere[:, 0, :8, 56:] -= 0.3
    losses = [reconstruction_loss(x, first, weights, config) for x in (in_focus, elsewhere)]
    assert losses[0] > 5 * losses[1] > 0


def test_batches_are_a_function_of_the_step():
    parts = [np.stack([np.full((8, 8, 3), 10 * e + t, np.uint8) for t in range(3 + e)]) for e in range(3)]
    batches = FrameBatches(parts, batch_size=200)
    one, two = batches.batch(5), batches.batch(5)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["frames"], batches.batch(6)["frames"])
    frames, neighbours = one["frames"][:, 0, 0, 0].int(), one["neighbours"][:, 0, 0, 0].int()
    assert torch.equal((frames - neighbours).abs(), torch.ones(200, dtype=torch.int32))
    assert set(frames.tolist()) == {0, 1, 2, 10, 11, 12, 13, 20, 21, 22, 23, 24}
    with pytest.raises(DatasetError, match="2 rows"):
        FrameBatches([parts[0][:1]], batch_size=2)


def test_recipes_say_it_all(tmp_path):
    for kind, recipe in RECIPES.items():
        config = recipe(TokenizerOptions(data=tmp_path, out=tmp_path, kind=kind, steps=5))
        assert config.tokenizer.kind == kind and config.train.steps == 5
        assert config.train.recipe["tokenizer"] == config.tokenizer.to_dict()
