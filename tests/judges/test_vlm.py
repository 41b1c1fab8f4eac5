"""The vision-language judge over a tiny real model of transformers with random weights."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from hma_gym.errors import CheckpointError, InvalidArgument
from hma_gym.judges.protocol import Judge
from hma_gym.judges.vlm import (
    VisionLanguageConfig,
    VisionLanguageJudge,
    import_transformers,
    load_vision_language_judge,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason='pip install "hma_gym[vlm]"'),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of transformers' own imports
]
WORDS = "<unk> <pad> <s> </s> <image> yes no is the cube lifted ?".split()
CONFIG = VisionLanguageConfig(window=3, frames=2, side=28, question="is the cube lifted ?", batch=2)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """A processor and a Llava of two layers, made here; nothing is downloaded."""
    transformers = import_transformers()
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**size, num_hidden_layers=2, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(
            **size, vocab_size=len(WORDS), num_hidden_layers=1, max_position_embeddings=64, pad_token_id=1
        ),
        image_token_id=WORDS.index("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return processor, transformers.LlavaForConditionalGeneration(config).eval()


def windows(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, 16, 16, 3), generator=generator).to(torch.uint8)


def test_it_is_a_judge_and_a_batch_changes_nothing(parts: tuple[Any, Any]) -> None:
    judge = VisionLanguageJudge(CONFIG, *parts)
    assert isinstance(judge, Judge)
    frames = windows(5)
    probability = judge.probability(frames)
    assert probability.shape == (5,) and probability.dtype == torch.float32
    assert ((probability > 0) & (probability < 1)).all() and probability.std() > 0
    assert torch.allclose(judge.probability(frames[3:4]), probability[3:4], atol=1e-5)
    changed = frames.clone()
    changed[:, -1] = 255 - changed[:, -1]
    assert not torch.allclose(judge.probability(changed), probability), "the last frame is always seen"


def test_yes_and_no_are_opposite(parts: tuple[Any, Any]) -> None:
    judge = VisionLanguageJudge(CONFIG, *parts)
    opposite = VisionLanguageJudge(dataclasses.replace(CONFIG, yes="no", no="yes"), *parts)
    frames = windows(2)
    assert torch.allclose(judge.probability(frames) + opposite.probability(frames), torch.ones(2), atol=1e-5)
    with pytest.raises(InvalidArgument, match="different tokens"):
        VisionLanguageJudge(dataclasses.replace(CONFIG, no="unheard"), *parts)


def test_from_a_folder(parts: tuple[Any, Any], tmp_path: Path) -> None:
    processor, model = parts
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = load_vision_language_judge(tmp_path, CONFIG)
    frames = windows(2)
    assert torch.allclose(
        loaded.probability(frames), VisionLanguageJudge(CONFIG, *parts).probability(frames), atol=1e-5
    )
    with pytest.raises(CheckpointError, match="vision-language model"):
        load_vision_language_judge(tmp_path / "absent", CONFIG)


@pytest.mark.parametrize("change", [{"frames": 4}, {"question": " "}, {"threshold": 1.0}, {"no": "yes"}, {"batch": 0}])
def test_impossible_configs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        dataclasses.replace(CONFIG, **change)
