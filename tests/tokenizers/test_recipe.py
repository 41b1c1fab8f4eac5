"""The recipe end to end on a toy file: train, measure, save, and start again from a tokenizer."""

import dataclasses

import numpy as np
import pytest
import torch

from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter, open_dataset
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.tokenizers import SoftConfig, VQConfig
from hma_gym.tokenizers.files import load_tokenizer
from hma_gym.training.recipes.tokenizer import RECIPES, TokenizerOptions, read_frames, train_tokenizer

SMALL = {"encoder_widths": (8, 12, 16), "decoder_widths": (16, 12, 8), "decoder_blocks": (1, 0, 0)}
CONFIGS = {"soft": SoftConfig(image_size=(16, 16), **SMALL), "vq": VQConfig(image_size=(16, 16), **SMALL)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    writer = EpisodeWriter(tmp_path_factory.mktemp("data") / "toy.hdf5", env_args={}, info={})
    rng = np.random.default_rng(0)
    for index in range(8):
        images = np.full((5, 16, 16, 3), 200, np.uint8)
        for row in range(5):
            images[row, row : row + 5, index : index + 5] = rng.integers(0, 255, 3)
        writer.write(
            index,
            Episode(
                images_THWC=images,
                agent_pos_TP=np.zeros((5, 0), np.float32),
                actions_TA=np.zeros((5, 2), np.float32),
                states_TS=np.zeros((5, 0)),
                rewards_T=np.zeros(5, np.float32),
                dones_T=np.zeros(5, bool),
                attrs={"category": "other", "success": False},
            ),
        )
    return writer.merge()


def recipe_of(data, out, kind, **changes):
    full = RECIPES[kind](TokenizerOptions(data=data, out=out, kind=kind, steps=6))
    train = dataclasses.replace(full.train, warmup_steps=1, progress=False)
    return dataclasses.replace(full, tokenizer=CONFIGS[kind], train=train, batch_size=4, **changes)


@pytest.fixture(scope="module")
def soft(data, tmp_path_factory):
    folder, result, figures = train_tokenizer(recipe_of(data, tmp_path_factory.mktemp("runs") / "soft", "soft"))
    assert result.finished and figures["psnr"] > 5 and "psnr_noise_0.1" in figures
    return folder


def test_a_trained_tokenizer_has_its_statistics(data, soft):
    tokenizer = load_tokenizer(soft, expect="soft")
    frames = torch.from_numpy(np.concatenate(read_frames(data, "train", 99, (16, 16))))
    tokens = tokenizer.encode(frames)
    torch.testing.assert_close(tokens.std((0, 1)), torch.ones(8), atol=0.05, rtol=0)


def test_a_still_is_its_own_neighbour(data, tmp_path):
    writer = EpisodeWriter(tmp_path / "stills.hdf5", env_args={}, info={})
    stills = dataclasses.replace(open_dataset(data)[0], attrs={"category": "still", "still": True})
    writer.append(stills)
    frames = read_frames(writer.merge(), "train", 9, (16, 16))
    assert [len(pair) for pair in frames] == [2] * 5
    for pair, image in zip(frames, stills.images_THWC, strict=True):
        np.testing.assert_array_equal(pair, np.stack((image, image)))


def test_training_the_decoder_alone_keeps_the_tokens(data, soft, tmp_path):
    recipe = recipe_of(data, tmp_path / "decoder", "soft", start=soft, decoder_only=True)
    folder, _, _ = train_tokenizer(recipe)
    before, after = load_tokenizer(soft), load_tokenizer(folder)
    frames = torch.from_numpy(read_frames(data, "valid", 1, (16, 16))[0])
    tokens = before.encode(frames)
    assert torch.equal(tokens, after.encode(frames))
    assert not torch.equal(before.decode(tokens), after.decode(tokens))


def test_vq_starts_from_the_soft_trunk(data, soft, tmp_path):
    folder, _, figures = train_tokenizer(recipe_of(data, tmp_path / "vq", "vq", start=soft))
    vq, source = load_tokenizer(folder, expect="vq"), load_tokenizer(soft)
    assert torch.equal(vq.state_dict()["reference_3HW"], source.state_dict()["reference_3HW"])
    assert 0 < figures["codes_used"] <= 1
    with pytest.raises(InvalidArgument, match="same config"):
        train_tokenizer(recipe_of(data, tmp_path / "no", "vq", start=soft, decoder_only=True))


def test_options_that_contradict_the_data(data, tmp_path):
    with pytest.raises(InvalidArgument, match="name its folder with start"):
        recipe_of(data, tmp_path, "soft", decoder_only=True)
    with pytest.raises(DatasetError, match=r"\(16, 16\).*\(64, 64\)"):
        read_frames(data, "train", 4, (64, 64))
