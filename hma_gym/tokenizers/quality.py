"""How good a tokenizer is: reconstruction where it counts, and how quietly its tokens follow what changes.

Shape legend: E episodes, T time, H W frame, N tokens a frame, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hma_gym.tokenizers.loss import change_mask, focus_mask, foreground_mask
from hma_gym.tokenizers.protocol import Tokenizer, check_frames

TOKEN_NOISE = (0.1, 0.2)
"""Standard deviations of the noise on soft tokens (whose own is 1) under which the reconstruction is measured."""


def _decibels(mean_square: torch.Tensor) -> float:
    return float(-10.0 * torch.log10(mean_square.clamp(min=1e-10)))


@torch.no_grad()
def measure_quality(
    tokenizer: Tokenizer,
    episodes_THWC: Sequence[torch.Tensor],
    background_HWC: torch.Tensor,
    focus_colour: tuple[float, float, float] | None = None,
) -> dict[str, float]:
    """Figures of a tokenizer on whole episodes, each (T, H, W, 3) uint8 with T >= 2.

    Returns:
        ``psnr``: dB, mean over frames. ``foreground_psnr``, ``change_psnr``, ``focus_psnr``: dB of the mean squared
        error pooled over such pixels (see :mod:`hma_gym.tokenizers.loss`; the last if ``focus_colour`` is given
        and occurs). ``pixels_changed``: share of pixels that change per step. For vq: ``tokens_changed``, the share
        of tokens that change per step; ``codes_used``, share of the vocabulary; ``code_perplexity``. For soft:
        ``token_change``, root mean square change per step (the tokens' own deviation is 1); ``tokens_changed``,
        share of tokens of which a channel changes by more than 0.1; ``psnr_noise_0.1``, ``psnr_noise_0.2``.
    """
    device = background_HWC.device
    background_3HW = background_HWC.permute(2, 0, 1).float() / 255.0
    frame_errors: list[torch.Tensor] = []
    noisy_errors: dict[float, list[torch.Tensor]] = {noise: [] for noise in TOKEN_NOISE}
    pooled = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in ("foreground", "change", "focus")}
    moving = torch.zeros(2, dtype=torch.float64, device=device)
    token_steps: list[torch.Tensor] = []
    counts_K = torch.zeros(_codes(tokenizer), dtype=torch.float64, device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    for frames_THWC in episodes_THWC:
        check_frames(frames_THWC, tokenizer.image_size)
        images_T3HW = frames_THWC.permute(0, 3, 1, 2).float() / 255.0
        tokens = tokenizer.encode(frames_THWC)
        error_THW = _squared_error(tokenizer.decode(tokens), images_T3HW)
        frame_errors.append(error_THW.mean((1, 2)))
        changed_THW = change_mask(images_T3HW[1:], images_T3HW[:-1])
        moving += torch.stack([changed_THW.sum(), torch.tensor(changed_THW.numel(), device=device)])
        masks = {"foreground": foreground_mask(images_T3HW, background_3HW)}
        pooled["change"] += _pool(error_THW[1:], changed_THW)
        if focus_colour is not None:
            masks["focus"] = focus_mask(images_T3HW, focus_colour)
        for name, mask_THW in masks.items():
            pooled[name] += _pool(error_THW, mask_THW)
        if tokenizer.kind == "vq":
            token_steps.append((tokens[1:] != tokens[:-1]).double())
            counts_K += torch.bincount(tokens.flatten(), minlength=len(counts_K))
        else:
            token_steps.append((tokens[1:] - tokens[:-1]).double())
            for noise in TOKEN_NOISE:
                shift = torch.empty_like(tokens).normal_(std=noise, generator=generator)
                noisy_errors[noise].append(_squared_error(tokenizer.decode(tokens + shift), images_T3HW).mean((1, 2)))
    figures = {"psnr": _mean_decibels(frame_errors)}
    for name, (total, count) in pooled.items():
        if count > 0:
            figures[f"{name}_psnr"] = _decibels(total / count)
    figures["pixels_changed"] = float(moving[0] / moving[1])
    steps = torch.cat(token_steps)
    if tokenizer.kind == "vq":
        probability_K = counts_K / counts_K.sum()
        figures["tokens_changed"] = float(steps.mean())
        figures["codes_used"] = float((counts_K > 0).double().mean())
        figures["code_perplexity"] = float(torch.exp(-torch.xlogy(probability_K, probability_K).sum()))
    else:
        figures["token_change"] = float(steps.square().mean().sqrt())
        figures["tokens_changed"] = float((steps.abs().amax(-1) > 0.1).double().mean())
        for noise, errors in noisy_errors.items():
            figures[f"psnr_noise_{noise}"] = _mean_decibels(errors)
    return figures


def _codes(tokenizer: Tokenizer) -> int:
    size = 1
    for factor in tokenizer.vocabulary:
        size *= factor
    return size


def _squared_error(frames_THWC: torch.Tensor, images_T3HW: torch.Tensor) -> torch.Tensor:
    return (frames_THWC.permute(0, 3, 1, 2).float() / 255.0 - images_T3HW).square().mean(1)


def _pool(error_THW: torch.Tensor, mask_THW: torch.Tensor) -> torch.Tensor:
    return torch.stack([error_THW[mask_THW].double().sum(), mask_THW.sum().double()])


def _mean_decibels(errors: Sequence[torch.Tensor]) -> float:
    return float((-10.0 * torch.log10(torch.cat(list(errors)).clamp(min=1e-10))).mean())
