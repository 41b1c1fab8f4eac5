"""The vision-language judge: any ``transformers`` image-text model is asked a yes-or-no question about some frames.

>>> judge = load_vision_language_judge("ORGANISATION/MODEL", VisionLanguageConfig())  # doctest: +SKIP
>>> get_episode_judge(judge).episode_probability(frames_BTHWC)  # doctest: +SKIP

The weights come from your own hub or folder; none ship with this package. The probability is the model's own:
``P(yes) / (P(yes) + P(no))`` for the next word of its answer. Nobody calibrated it for your task: measure it against
people or ground truth (``docs/judges.md``) before trusting it, and set ``threshold`` on what you find.

To use it by name, offer an entry point that calls :func:`load_vision_language_judge` (see
:mod:`hma_gym.judges.registry`).

Shape legend: B batch, K window, F sampled frames of it, H W C image, V words.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hma_gym.errors import CheckpointError, InvalidArgument
from hma_gym.extras import require
from hma_gym.judges.protocol import check_window
from hma_gym.robomimic_compat import make_torchvision_importable

LIFT_QUESTION = (
    "These are frames of a robot arm at a table with a red cube, in order of time. In the last frame, is the cube held "
    "in the air, clearly above the table? Answer with one word, yes or no."
)


@dataclass(frozen=True)
class VisionLanguageConfig:
    """What the model is asked.

    Attributes:
        name: for reports.
        question: to be answered by yes or no.
        yes, no: the two answers.
        window: K, last frames that the judge receives.
        frames: F, how many of them the model sees, evenly spread, the last one always among them.
        side: pixels; smaller frames are enlarged to it, for most models read nothing in 64 x 64.
        threshold: the verdict is ``probability >= threshold``.
        batch: questions in one call of the model.
    """

    name: str = "vision-language"
    question: str = LIFT_QUESTION
    yes: str = "yes"
    no: str = "no"
    window: int = 16
    frames: int = 4
    side: int = 336
    threshold: float = 0.5
    batch: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.frames <= self.window or self.batch < 1 or self.side < 1:
            raise InvalidArgument(
                "a vision-language judge needs 1 <= frames <= window, and batch and side of at least 1, got "
                f"frames={self.frames}, window={self.window}, batch={self.batch}, side={self.side}."
            )
        if not self.question.strip() or not 0 < self.threshold < 1 or self.yes == self.no:
            raise InvalidArgument(
                "a vision-language judge needs a question, two different answers and 0 < threshold < 1, got "
                f"question={self.question!r}, yes={self.yes!r}, no={self.no!r}, threshold={self.threshold}."
            )


class VisionLanguageJudge:
    """A model and its processor as a judge; satisfies :class:`~hma_gym.judges.protocol.Judge`.

    Args:
        config: what it is asked.
        processor: a ``transformers`` processor of images and text, with a chat template or an image token.
        model: an image-text-to-text model, in inference mode, on its device.

    Raises:
        InvalidArgument: the tokenizer makes the same first token of both answers.
    """

    def __init__(self, config: VisionLanguageConfig, processor: Any, model: Any) -> None:
        self.config = config
        self._processor = processor
        self._model = model
        # The answer's last token is the next token only where the prompt ends: padding goes to the left.
        processor.tokenizer.padding_side = "left"
        self._yes, self._no = _answer_tokens(processor, config.yes), _answer_tokens(processor, config.no)
        if self._yes & self._no or not self._yes or not self._no:
            raise InvalidArgument(
                f"yes and no must begin with different tokens of the model's vocabulary, got {config.yes!r} as "
                f"{sorted(self._yes)} and {config.no!r} as {sorted(self._no)}; choose other words."
            )

    @property
    def name(self) -> str:
        """For reports."""
        return self.config.name

    @property
    def window(self) -> int:
        """K, last frames received."""
        return self.config.window

    @property
    def threshold(self) -> float:
        """The verdict is ``probability >= threshold``."""
        return self.config.threshold

    @torch.inference_mode()
    def probability(self, frames_BKHWC: Tensor) -> Tensor:
        """(B, K, H, W, C) uint8, oldest first, to ``P(yes) / (P(yes) + P(no))``: (B,) float32."""
        check_window(self, frames_BKHWC)
        chosen = torch.linspace(0, self.window - 1, self.config.frames + 1)[1:].round().long()
        parts = [self._ask(part) for part in frames_BKHWC[:, chosen].cpu().split(self.config.batch)]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _ask(self, frames_BFHWC: Tensor) -> Tensor:
        images = [[self._picture(frame) for frame in frames_FHWC] for frames_FHWC in frames_BFHWC]
        inputs = self._processor(
            images=images, text=[self._prompt()] * len(images), padding=True, return_tensors="pt"
        ).to(self._model.device)
        logits_BV = self._model(**inputs).logits[:, -1].float()
        yes = logits_BV[:, sorted(self._yes)].logsumexp(dim=1)
        no = logits_BV[:, sorted(self._no)].logsumexp(dim=1)
        return torch.sigmoid(yes - no).cpu()

    def _picture(self, frame_HWC: Tensor) -> Image.Image:
        picture = Image.fromarray(frame_HWC.numpy())
        scale = self.config.side / min(picture.size)
        if scale <= 1:
            return picture
        size = (round(picture.width * scale), round(picture.height * scale))
        return picture.resize(size, Image.Resampling.BICUBIC)

    def _prompt(self) -> str:
        content = [
            *({"type": "image"} for _ in range(self.config.frames)),
            {"type": "text", "text": self.config.question},
        ]
        if self._processor.chat_template is not None:
            prompt = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            return str(prompt)
        return f"{self._processor.image_token * self.config.frames}\n{self.config.question}\n"


def import_transformers() -> ModuleType:
    """``transformers``, also beside a torchvision whose compiled part does not load here.

    Raises:
        MissingExtra: transformers is not installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        make_torchvision_importable()
    return require("transformers", extra="vlm", purpose="the vision-language judge")


def load_vision_language_judge(
    model: str | Path,
    config: VisionLanguageConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VisionLanguageJudge:
    """A judge from a hub id or a folder.

    Args:
        model: of any image-text-to-text model that ``transformers`` knows.
        config: what it is asked; the question about Lift by default.
        device, dtype: of the weights.

    Raises:
        MissingExtra: transformers is not installed.
        CheckpointError: the model cannot be found or read.
    """
    transformers = import_transformers()
    try:
        processor = transformers.AutoProcessor.from_pretrained(model)
        network = transformers.AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot load a vision-language model from {str(model)!r}: {error}; give a hub id or a folder of an "
            "image-text-to-text model of transformers."
        ) from error
    return VisionLanguageJudge(config or VisionLanguageConfig(), processor, network.to(device).eval())


def _answer_tokens(processor: Any, word: str) -> set[int]:
    """The first tokens of the ways to write an answer: yes, Yes, and both after a space."""
    tokenizer = processor.tokenizer
    spellings = {form for base in (word, word.capitalize()) for form in (base, f" {base}")}
    encoded = (tokenizer.encode(spelling, add_special_tokens=False) for spelling in sorted(spellings))
    return {tokens[0] for tokens in encoded if tokens} - {tokenizer.unk_token_id}
