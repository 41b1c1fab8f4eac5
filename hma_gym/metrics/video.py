"""Video fidelity: PSNR, foreground PSNR, SSIM and delta-PSNR on uint8 frames.

Every function takes ``torch.uint8`` frames with any leading dims and returns one float32 value per frame, on the
frames' device.

Shape legend: ``...`` leading dims (batch, time), H height, W width, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hma_gym.errors import InvalidImage

PEAK = 255.0
"""Largest pixel value; the peak of every PSNR here."""

PSNR_CAP = 100.0
"""What two identical frames score, in dB, so that means stay finite. Frames of fewer than 153 thousand values
(224 x 224 in colour) that differ at all score less."""


def _check_pair(reference: Tensor, test: Tensor) -> None:
    for name, frames in (("reference", reference), ("test", test)):
        if frames.dtype != torch.uint8 or frames.ndim < 3:
            raise InvalidImage(
                f"{name} must be torch.uint8 frames of shape (..., H, W, C), got {frames.dtype} with shape "
                f"{tuple(frames.shape)}; convert with torch.from_numpy(frames) before measuring."
            )
    if reference.shape != test.shape:
        raise InvalidImage(
            f"reference and test must have one shape, got {tuple(reference.shape)} and {tuple(test.shape)}; "
            "cut or expand one of them to the other."
        )


def _to_psnr(squared_error_mean: Tensor) -> Tensor:
    return (10.0 * torch.log10(PEAK**2 / squared_error_mean.clamp_min(PEAK**2 / 10 ** (PSNR_CAP / 10)))).float()


def psnr(reference: Tensor, test: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB.

    ``10 log10(255^2 / MSE)``, MSE over all pixels and channels of one frame; identical frames score
    :data:`PSNR_CAP`. The PSNR of a video is the mean of its frames' values (not the PSNR of the mean error).

    Args:
        reference, test: (..., H, W, C) uint8.

    Returns:
        (...) float32.
    """
    _check_pair(reference, test)
    difference = reference.float() - test.float()
    return _to_psnr(difference.square().mean(dim=(-3, -2, -1)))


def foreground_mask(frames: Tensor, background_HWC: Tensor, threshold: int = 24) -> Tensor:
    """Pixels in which any channel differs from the background by more than ``threshold`` of 255: (..., H, W) bool."""
    difference = frames.to(torch.int16) - background_HWC.to(torch.int16)
    return difference.abs().amax(dim=-1) > threshold


def background_image(frames_NHWC: Tensor, share: float = 0.2) -> Tensor:
    """What the camera sees once the moving things are gone: each pixel's most usual colour over N frames.

    Of each pixel's N brightnesses, sorted, the narrowest run that holds ``share`` of them is taken, and the mean colour
    of its frames. Unlike the median this is right also where a moving thing stands most of the time, as long as its
    shade changes more than the background's.

    Args:
        frames_NHWC: uint8, spread over many episodes.
        share: of the frames, in (0, 1], in which the background must be seen in a pixel.

    Returns:
        (H, W, C) uint8.
    """
    count = len(frames_NHWC)
    run = min(count, max(1, math.ceil(share * count)))
    brightness_NHW = frames_NHWC.float().sum(dim=-1)
    sorted_NHW, order_NHW = brightness_NHW.sort(dim=0)
    widths = sorted_NHW[run - 1 :] - sorted_NHW[: count - run + 1]
    first_HW = widths.argmin(dim=0)
    inside = first_HW + torch.arange(run, device=frames_NHWC.device)[:, None, None]
    chosen = order_NHW.gather(0, inside)[..., None].expand(-1, -1, -1, frames_NHWC.shape[-1])
    return frames_NHWC.gather(0, chosen).float().mean(dim=0).round().to(torch.uint8)


def foreground_psnr(reference: Tensor, test: Tensor, background_HWC: Tensor, threshold: int = 24) -> Tensor:
    """PSNR over the reference's foreground pixels only (:func:`foreground_mask`), in dB.

    The robot and the object cover a tenth of the picture; the plain PSNR is mostly the background's. A frame
    without foreground scores NaN. The mask is the reference's: what a video invents elsewhere shows in
    :func:`psnr`.
    """
    _check_pair(reference, test)
    mask = foreground_mask(reference, background_HWC, threshold)
    squared = (reference.float() - test.float()).square().mean(dim=-1)
    count = mask.sum(dim=(-2, -1))
    total = (squared * mask).sum(dim=(-2, -1))
    value = _to_psnr(total / count.clamp_min(1))
    return torch.where(count > 0, value, torch.full_like(value, float("nan")))


def _gaussian_window(size: int, sigma: float, device: torch.device) -> Tensor:
    offset = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    weight = torch.exp(-offset.square() / (2 * sigma**2))
    return weight / weight.sum()


def ssim(reference: Tensor, test: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of each frame, in [-1, 1] (Wang et al. 2004, the constants of the paper).

    A ``window`` x ``window`` Gaussian of standard deviation ``sigma``; K1 = 0.01, K2 = 0.03, L = 255; population
    covariance; only windows that lie inside the frame; the mean over positions and channels.

    Args:
        reference, test: (..., H, W, C) uint8, H and W at least ``window``.

    Returns:
        (...) float32.
    """
    _check_pair(reference, test)
    height, width, channels = reference.shape[-3:]
    if min(height, width) < window:
        raise InvalidImage(
            f"SSIM needs frames of at least {window} x {window} pixels, got {height} x {width}; pass a smaller window."
        )
    weight = _gaussian_window(window, sigma, reference.device)
    leading = reference.shape[:-3]

    def planes(frames: Tensor) -> Tensor:
        return frames.reshape(-1, height, width, channels).permute(0, 3, 1, 2).reshape(-1, 1, height, width).float()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))

    x, y = planes(reference), planes(test)
    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x.square()
    variance_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    )
    per_plane = similarity.mean(dim=(-3, -2, -1))
    return per_plane.reshape(-1, channels).mean(dim=-1).reshape(leading)


def delta_psnr(truth_BHWC: Tensor, under_true_actions_BHWC: Tensor, under_random_actions_BRHWC: Tensor) -> Tensor:
    """Controllability: what a frame loses when the actions are replaced by random ones, in dB.

    ``PSNR(truth, frame under the true actions) - mean over R of PSNR(truth, frame under random actions r)``, on one
    frame (the last) of each episode, as in HMA (arXiv 2502.04296, Section 4.1) after Genie (arXiv 2402.15391,
    Section 3). A model deaf to actions scores 0.

    Args:
        truth_BHWC: the real frame.
        under_true_actions_BHWC: the generated frame under the recorded actions.
        under_random_actions_BRHWC: generated frames under R random action sequences.

    Returns:
        (B,) float32.
    """
    repeated = truth_BHWC.unsqueeze(1).expand_as(under_random_actions_BRHWC)
    return psnr(truth_BHWC, under_true_actions_BHWC) - psnr(repeated, under_random_actions_BRHWC).mean(dim=1)
