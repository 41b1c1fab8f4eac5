"""PSNR, SSIM, foreground PSNR and delta-PSNR against independent references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hma_gym.errors import InvalidImage
from hma_gym.metrics import video


def _frames(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def _noisy(frames: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    noise = torch.from_numpy(np.random.default_rng(seed).normal(0, sigma, frames.shape))
    return (frames.double() + noise).round().clamp(0, 255).to(torch.uint8)


def test_psnr_of_a_known_error() -> None:
    reference = torch.full((2, 3, 8, 8, 3), 100, dtype=torch.uint8)
    test = reference + 5
    expected = 20 * math.log10(255 / 5)
    assert video.psnr(reference, test).shape == (2, 3)
    assert torch.allclose(video.psnr(reference, test), torch.full((2, 3), expected))
    assert torch.equal(video.psnr(reference, reference), torch.full((2, 3), video.PSNR_CAP))


def test_psnr_does_not_wrap_around_uint8() -> None:
    black, white = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    assert float(video.psnr(black, white)) == pytest.approx(0.0, abs=1e-5)


def _reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, window by window in float64."""
    axis = np.arange(11) - 5.0
    kernel = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(a.shape[2]):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                x = a[i : i + 11, j : j + 11, channel].astype(np.float64)
                y = b[i : i + 11, j : j + 11, channel].astype(np.float64)
                mx, my = (kernel * x).sum(), (kernel * y).sum()
                vx, vy = (kernel * (x - mx) ** 2).sum(), (kernel * (y - my) ** 2).sum()
                cov = (kernel * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("sigma", [0.0, 8.0, 60.0])
def test_ssim_equals_the_written_formula(sigma: float) -> None:
    ramp = np.add.outer(np.arange(20), 2 * np.arange(18)) * 4
    base = torch.from_numpy(np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1).astype(np.uint8))
    noisy = _noisy(base, sigma, 1)
    got = float(video.ssim(base, noisy))
    assert got == pytest.approx(_reference_ssim(base.numpy(), noisy.numpy()), abs=2e-4)
    assert (got == pytest.approx(1.0, abs=1e-5)) == (sigma == 0.0)


def test_ssim_keeps_leading_dims_apart() -> None:
    reference = _frames(0, 2, 3, 16, 16, 3)
    test = _noisy(reference, 20, 1)
    whole = video.ssim(reference, test)
    assert whole.shape == (2, 3)
    assert torch.allclose(whole[1, 2], video.ssim(reference[1, 2], test[1, 2]))


def test_foreground_psnr_sees_only_the_foreground() -> None:
    background = torch.full((16, 16, 3), 50, dtype=torch.uint8)
    truth = background.clone()
    truth[4:8, 4:8] = 200
    generated = truth.clone()
    generated[0, 0] = 255  # an error in the background
    truth, generated = truth[None], generated[None]
    assert float(video.foreground_psnr(truth, generated, background)) == video.PSNR_CAP
    generated[0, 4:8, 4:8] = 190
    expected = 20 * math.log10(255 / 10)
    assert float(video.foreground_psnr(truth, generated, background)) == pytest.approx(expected, abs=1e-4)
    assert int(video.foreground_mask(truth, background).sum()) == 16


def test_foreground_psnr_of_an_empty_scene_is_nan() -> None:
    background = torch.full((1, 16, 16, 3), 50, dtype=torch.uint8)
    assert torch.isnan(video.foreground_psnr(background, background + 3, background[0])).all()


def test_background_is_the_most_usual_colour() -> None:
    frames = torch.full((7, 8, 8, 3), 90, dtype=torch.uint8)
    for i in range(7):
        frames[i, i] = 255
    assert torch.equal(video.background_image(frames), torch.full((8, 8, 3), 90, dtype=torch.uint8))


def test_background_is_found_behind_what_is_mostly_in_front() -> None:
    frames = torch.full((40, 4, 4, 3), 200, dtype=torch.uint8) + (torch.arange(40) % 3)[:, None, None, None].to(
        torch.uint8
    )
    shades = torch.linspace(20, 150, 24).to(torch.uint8)
    frames[:24, 1, 1] = shades[:, None]  # 60 percent of the time, in changing shades
    found = video.background_image(frames)
    assert ((found.int() - 201).abs() <= 1).all()
    assert torch.equal(video.background_image(frames[:1]), frames[0])


def test_delta_psnr_is_zero_for_a_model_deaf_to_actions() -> None:
    truth = _frames(0, 4, 16, 16, 3)
    same = _noisy(truth, 10, 1)
    deaf = same.unsqueeze(1).expand(-1, 5, -1, -1, -1)
    assert torch.allclose(video.delta_psnr(truth, same, deaf), torch.zeros(4), atol=1e-4)
    worse = torch.stack([_noisy(truth, 10 * 2**r, r) for r in range(1, 4)], dim=1)
    by_hand = video.psnr(truth, same) - torch.stack([video.psnr(truth, worse[:, r]) for r in range(3)]).mean(0)
    assert torch.allclose(video.delta_psnr(truth, same, worse), by_hand, atol=1e-4)
    assert (by_hand > 3).all()


@pytest.mark.parametrize(
    ("reference", "test", "words"),
    [
        (torch.zeros(8, 8, 3), torch.zeros(8, 8, 3), "torch.uint8"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 9, 3, dtype=torch.uint8), "one shape"),
    ],
)
def test_wrong_frames_are_refused(reference: torch.Tensor, test: torch.Tensor, words: str) -> None:
    with pytest.raises(InvalidImage, match=words):
        video.psnr(reference, test)
    with pytest.raises(InvalidImage, match="at least 11 x 11"):
        video.ssim(torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8))
