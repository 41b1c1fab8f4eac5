"""From an image to points: a small convolutional network with group norm and a spatial softmax.

Shape legend: B images, C channels, H W image or feature map, K keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GROUPS = 8


class SpatialSoftmax(nn.Module):
    """Where each channel is active: a softmax over the map, then the expected place (Levine et al. 2016, Section 4.2).

    Args:
        size: (H, W) of the feature map.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        height, width = size
        rows = torch.linspace(-1, 1, height)[:, None].expand(height, width)
        columns = torch.linspace(-1, 1, width)[None, :].expand(height, width)
        self.register_buffer("places_L2", torch.stack([columns, rows], dim=-1).reshape(-1, 2), persistent=False)
        self.places_L2: Tensor

    def forward(self, features_BKHW: Tensor) -> Tensor:
        """(B, K, H, W) to (B, 2 K): x and y of each channel, -1 to 1."""
        weights_BKL = features_BKHW.flatten(2).float().softmax(dim=-1)
        with torch.autocast(weights_BKL.device.type, enabled=False):  # bfloat16 has an eighth of a pixel
            return (weights_BKL @ self.places_L2).flatten(1)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(_GROUPS, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(_GROUPS, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x_BCHW)))
        return F.relu(x_BCHW + self.second_norm(self.second(inner)))


class ImageEncoder(nn.Module):
    """Two strided convolutions, residual blocks at a quarter of the resolution, and a spatial softmax.

    Args:
        image_size: (H, W), multiples of 4.
        channels: widths of the first convolution and of everything after it; multiples of 8.
        blocks: residual blocks.
        keypoints: K.

    Attributes:
        size: 2 K, numbers that an image becomes.
    """

    def __init__(self, image_size: tuple[int, int], channels: Sequence[int], blocks: int, keypoints: int) -> None:
        super().__init__()
        first, width = channels
        self.size = 2 * keypoints
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 5, stride=2, padding=2, bias=False),
            nn.GroupNorm(_GROUPS, first),
            nn.ReLU(),
            nn.Conv2d(first, width, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(_GROUPS, width),
            nn.ReLU(),
        )
        self.blocks = nn.Sequential(*(_ResidualBlock(width) for _ in range(blocks)))
        self.maps = nn.Conv2d(width, keypoints, 1)
        self.softmax = SpatialSoftmax((image_size[0] // 4, image_size[1] // 4))

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """(B, H, W, 3) float in [-1, 1] to (B, 2 K) in [-1, 1]."""
        return torch.as_tensor(self.softmax(self.maps(self.blocks(self.stem(images_BHWC.permute(0, 3, 1, 2))))))


def damage_images(images_BHWC: Tensor, generator: torch.Generator) -> Tensor:
    """Training images as another camera would show them: light, contrast and grain differ; the geometry stays.

    Nothing is shifted or cropped: to a fixed camera a pixel is a place, and a policy needs the place.

    Args:
        images_BHWC: float in [-1, 1].
        generator: on the images' device.
    """
    shape = (len(images_BHWC), 1, 1, 3)
    device = images_BHWC.device
    gain = 1 + 0.1 * (2 * torch.rand(shape, generator=generator, device=device) - 1)
    offset = 0.1 * (2 * torch.rand(shape, generator=generator, device=device) - 1)
    grain = 0.05 * torch.rand((len(images_BHWC), 1, 1, 1), generator=generator, device=device)
    noise = torch.randn(images_BHWC.shape, generator=generator, device=device)
    return (images_BHWC * gain + offset + grain * noise).clamp(-1, 1)
