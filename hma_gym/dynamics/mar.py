"""The continuous ("soft") token head: a regressed mean and a small diffusion head, in a few steps (HMA, Eq. 3).

The change from the previous frame is what is predicted: its mean by a linear read-out and, where the body draws the
frame, by a gate between the previous tokens and the drawn ones; and what remains around the
mean by a per-token MLP trained with flow matching (Lipman et al. 2023, arXiv 2210.02747, with straight paths), which
takes the place of the paper's 100-step DDPM head and needs 1 to 8 evaluations.

Shape legend: see :mod:`hma_gym.dynamics.heads`; E = patch**2 * C numbers of one trunk position, F width of the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.dynamics.heads import Draw, Scene
from hma_gym.errors import InvalidArgument
from hma_gym.nn.parameters import weight_of
from hma_gym.nn.patches import from_patches, to_patches
from hma_gym.nn.transformer import BASE_WIDTH

#: Where the gate towards the drawn tokens begins, before its sigmoid: nearly closed.
CLOSED = -3.0


@dataclass(frozen=True)
class FlowHeadConfig:
    """Geometry and training of the soft head.

    Attributes:
        grid: (rows, columns) of the tokenizer's latent grid; S = rows * columns.
        channels: C.
        patch: side of the square of tokens that share a trunk position.
        change_scale: root mean square of one step's change of a latent, from the training data; puts losses near 1.
        flow_width, flow_layers: the MLP.
        flow_steps: evaluations of the MLP in sampling.
        noise_max: context corruption: previous latents get Gaussian noise of a level uniform in [0, noise_max].
        flow_weight: weight of the flow-matching loss beside the mean's.
    """

    grid: tuple[int, int] = (8, 8)
    channels: int = 8
    patch: int = 2
    change_scale: float = 0.25
    flow_width: int = 256
    flow_layers: int = 3
    flow_steps: int = 4
    noise_max: float = 0.1
    flow_weight: float = 0.2

    def __post_init__(self) -> None:
        if self.grid[0] % self.patch or self.grid[1] % self.patch:
            raise InvalidArgument(f"soft head: patch must divide the grid, got patch={self.patch}, grid={self.grid}.")


class FlowLayer(nn.Module):
    """One residual layer of the flow MLP, modulated by the condition (as in MAR, Li et al. 2024)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        change: Tensor = self.down(F.silu(self.up(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)))
        return x + change


class FlowMLP(nn.Module):
    """The velocity of a token's residual at flow time t, given the trunk's feature and the regressed mean."""

    def __init__(self, size: int, features: int, width: int, layers: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2 * math.pi * 2.0 ** torch.linspace(-1, 4, 16), persistent=False)
        self.value = nn.Linear(size, width)
        self.condition = nn.Linear(features + size + 32, width)
        with torch.no_grad():  # the trunk's features grow in number with its width, their share in the sum does not
            self.condition.weight[:, :features] *= math.sqrt(BASE_WIDTH / features)
        self.layers = nn.ModuleList(FlowLayer(width) for _ in range(layers))
        self.out = nn.Linear(width, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, y: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """``y``: (..., E); ``time``: (..., 1) in [0, 1]; ``context``: (..., D + E). Returns (..., E)."""
        angle = time * self.frequencies
        condition = F.silu(self.condition(torch.cat((context, angle.cos(), angle.sin()), dim=-1)))
        x = self.value(y)
        for layer in self.layers:
            x = layer(x, condition)
        velocity: Tensor = self.out(F.layer_norm(x, x.shape[-1:]))
        return velocity


class FlowHead(nn.Module):
    """Soft tokens in, soft tokens out. Implements :class:`hma_gym.dynamics.heads.TokenHead`."""

    kind = "soft"

    def __init__(self, config: FlowHeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        self.positions = rows * columns // config.patch**2
        size = config.channels * config.patch**2
        self.previous_in = nn.Linear(size, width)
        self.current_in = nn.Linear(size, width)
        self.drawn_size: tuple[int, int] | None = (rows * columns, config.channels)
        self.drawn_in = nn.Linear(2 * size, width)
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self.mean_out = nn.Linear(width, size)
        self.gate_out = nn.Linear(width, size)
        self.flow = FlowMLP(size, width, config.flow_width, config.flow_layers)
        self.residual_rms: Tensor
        self.register_buffer("residual_rms", torch.tensor(config.change_scale))
        for layer in (self.mean_out, self.gate_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.gate_out.bias, CLOSED)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return []

    def readouts(self) -> list[nn.Parameter]:
        return [weight_of(self.mean_out), weight_of(self.gate_out), weight_of(self.flow.condition)]

    def _patch(self, tokens: Tensor) -> Tensor:
        return to_patches(tokens, self.config.grid, self.config.patch)

    def _unpatch(self, patches: Tensor) -> Tensor:
        return from_patches(patches, self.config.grid, self.config.patch)

    def embed_previous(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.previous_in(self._patch(tokens))
        return embedded

    def embed_current(self, tokens: Tensor, masked_BTN: Tensor) -> Tensor:
        embedded = self.current_in(self._patch(tokens))
        return torch.where(masked_BTN[..., None], self.mask_embedding.to(embedded.dtype), embedded)

    def embed_drawn(self, drawn: Tensor, before: Tensor) -> Tensor:
        embedded: Tensor = self.drawn_in(torch.cat((self._patch(drawn), self._patch(before)), dim=-1))
        return embedded

    def _mean(self, features: Tensor, scene: Scene) -> Tensor:
        """The expected change of each patch, (..., N, E)."""
        mean: Tensor = self.mean_out(features).float() * self.config.change_scale
        if scene.drawn is not None:
            towards = self._patch(scene.drawn.float()) - self._patch(scene.previous)
            mean = mean + self.gate_out(features).float().sigmoid() * towards
        return mean

    def corrupt(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        level = torch.rand(tokens.shape[0], *(1,) * (tokens.ndim - 1), generator=generator, device=tokens.device)
        noise = torch.randn(tokens.shape, generator=generator, device=tokens.device)
        return tokens + self.config.noise_max * level * noise

    def loss(
        self, features_BTND: Tensor, tokens: Tensor, scene: Scene, masked_BTN: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        change = self._patch(tokens) - self._patch(scene.previous)
        mean = self._mean(features_BTND, scene)
        residual = change - mean
        weight = masked_BTN.float() / masked_BTN.float().sum().clamp(min=1)
        error = residual.square().mean(dim=-1)
        mean_loss = (error * weight).sum() / config.change_scale**2
        if self.training:
            with torch.no_grad():
                self.residual_rms.lerp_((error * weight).sum().sqrt(), 0.01)
        y = residual.detach() / self.residual_rms
        time = torch.rand(*y.shape[:-1], 1, generator=generator, device=y.device)
        start = torch.randn(y.shape, generator=generator, device=y.device)
        context = torch.cat((features_BTND, (mean.detach() / config.change_scale).to(features_BTND.dtype)), dim=-1)
        velocity = self.flow(start + time * (y - start), time, context).float()
        flow_loss = ((velocity - (y - start)).square().mean(dim=-1) * weight).sum()
        loss = mean_loss + config.flow_weight * flow_loss
        return loss, {"mean_loss": mean_loss.detach(), "flow_loss": flow_loss.detach()}

    def sample(self, features_BND: Tensor, scene: Scene, draw: Draw, temperature: float) -> tuple[Tensor, Tensor]:
        config = self.config
        mean = self._mean(features_BND, scene)
        change = mean
        if temperature > 0:
            context = torch.cat((features_BND, (mean / config.change_scale).to(features_BND.dtype)), dim=-1)
            y = temperature * Draw(draw.seed_B, draw.step_B, draw.stream * 64).normal(*mean.shape[1:])
            for step in range(config.flow_steps):
                time = torch.full((*y.shape[:-1], 1), step / config.flow_steps, device=y.device)
                y = y + self.flow(y, time, context).float() / config.flow_steps
            change = mean + y * self.residual_rms
        order_BN = Draw(draw.seed_B, draw.step_B, draw.stream * 64 + 63).uniform(self.positions)
        return scene.previous + self._unpatch(change), order_BN

    def merge(self, old: Tensor, new: Tensor, masked_BN: Tensor) -> Tensor:
        return self._unpatch(torch.where(masked_BN[..., None], self._patch(new), self._patch(old)))

    def blank(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)
