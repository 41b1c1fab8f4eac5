"""The continuous ("soft") token head: a regressed mean, and a noise model for what it leaves over (HMA, Eq. 3).

The change from the previous frame is what is predicted: its mean by a linear read-out and, where the body draws the
frame, by a gate between the previous tokens and the drawn ones. What remains is left to a per-token MLP that carries
noise to a sample, given the trunk's feature and that mean. It is one of two, by the configuration:

- :class:`Flow`: flow matching (Lipman et al. 2023, arXiv 2210.02747, with straight paths), 1 to 8 evaluations;
- :class:`Diffusion`: the paper's (HMA, Sections 3.3 and 3.5; MAR, Li et al. 2024, arXiv 2406.11838), 1000 noise levels
  on a cosine schedule and 100 DDIM steps; of the residual or, as in the paper, of the tokens themselves, and if wanted
  with a second MLP for actions.

Shape legend: see :mod:`hma_gym.dynamics.heads`; E = patch**2 * C numbers of one trunk position, F width of the MLP,
G numbers of its context (the trunk's feature, and what else is known).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.dynamics.heads import Draw, Scene
from hma_gym.errors import InvalidArgument
from hma_gym.nn.parameters import silence, weight_of
from hma_gym.nn.patches import from_patches, to_patches
from hma_gym.nn.transformer import BASE_WIDTH
from hma_gym.tokenizers.protocol import check_soft_tokens

#: Where the gate towards the drawn tokens begins, before its sigmoid: nearly closed.
CLOSED = -3.0


@dataclass(frozen=True)
class SoftHeadConfig:
    """Geometry and training that the soft heads share.

    Attributes:
        grid: (rows, columns) of the tokenizer's latent grid; S = rows * columns.
        channels: C.
        patch: side of the square of tokens that share a trunk position.
        change_scale: root mean square of one step's change of a latent, from the training data; puts losses near 1.
        flow_width, flow_layers: the MLP.
        flow_steps: evaluations of the MLP in sampling.
        noise_max: context corruption: previous latents get Gaussian noise of a level uniform in [0, noise_max].
        flow_weight: weight of the noise model's loss beside the mean's.
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
        if self.flow_steps < 1:
            raise InvalidArgument(f"soft head: flow_steps must be at least 1, got {self.flow_steps}.")


@dataclass(frozen=True)
class FlowHeadConfig(SoftHeadConfig):
    """The few-step head: flow matching of the residual."""


@dataclass(frozen=True)
class DiffusionHeadConfig(SoftHeadConfig):
    """The paper's head.

    Attributes:
        flow_steps: DDIM steps.
        train_steps: noise levels in training.
        predicts: ``latent`` diffuses the tokens themselves, as the paper does; ``residual`` what the mean leaves over.
        clip: bound on the clean sample that a DDIM step reckons with, in standard deviations (tails are heavy).
        action_layers: depth of an MLP for each domain that diffuses its actions (Eq. 3); 0 for a linear read-out.
    """

    flow_steps: int = 100
    train_steps: int = 1000
    predicts: Literal["latent", "residual"] = "residual"
    clip: float = 12.0
    action_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flow_steps > self.train_steps:
            raise InvalidArgument(
                f"diffusion head: flow_steps must be at most train_steps, got {self.flow_steps} and {self.train_steps}."
            )
        if self.predicts not in ("latent", "residual"):
            raise InvalidArgument(f"diffusion head: predicts must be 'latent' or 'residual', got {self.predicts!r}.")
        if not self.clip > 0 or self.action_layers < 0:
            raise InvalidArgument(
                "diffusion head: clip must be above 0 and action_layers at least 0, got "
                f"clip={self.clip}, action_layers={self.action_layers}."
            )


class FlowLayer(nn.Module):
    """One residual layer of the MLP, modulated by the condition (as in MAR, Li et al. 2024)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        change: Tensor = self.down(F.silu(self.up(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)))
        return x + change


class NoiseModel(nn.Module, ABC):
    """A per-token MLP that carries noise to samples of unit deviation; a subclass says along which path.

    Args:
        config: width of the MLP, and evaluations in sampling.
        size: E, numbers of a sample.
        features: how many of the context's numbers are the trunk's feature, which come first.
        known: how many come after them.
        layers: depth of the MLP.
    """

    def __init__(self, config: SoftHeadConfig, size: int, features: int, known: int, layers: int) -> None:
        super().__init__()
        self.steps, width = config.flow_steps, config.flow_width
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2 * math.pi * 2.0 ** torch.linspace(-1, 4, 16), persistent=False)
        self.value = nn.Linear(size, width)
        self.condition = nn.Linear(features + known + 32, width)
        with torch.no_grad():  # the trunk's features grow in number with its width, their share in the sum does not
            self.condition.weight[:, :features] *= math.sqrt(BASE_WIDTH / features)
        self.layers = nn.ModuleList(FlowLayer(width) for _ in range(layers))
        self.out = nn.Linear(width, size)
        silence(self.out)

    def forward(self, y: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """``y``: (..., E); ``time``: (..., 1) in [0, 1]; ``context``: (..., G). Returns (..., E)."""
        angle = time * self.frequencies
        condition = F.silu(self.condition(torch.cat((context, angle.cos(), angle.sin()), dim=-1)))
        x = self.value(y)
        for layer in self.layers:
            x = layer(x, condition)
        result: Tensor = self.out(F.layer_norm(x, x.shape[-1:]))
        return result

    @abstractmethod
    def error(self, y: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
        """The training loss of each sample: ``y`` (..., E) of unit deviation, ``context`` (..., G). Returns (...)."""

    @abstractmethod
    def sample(self, noise: Tensor, context: Tensor) -> Tensor:
        """Samples (..., E), a function of standard normal ``noise`` (..., E) and ``context`` (..., G)."""


class Flow(NoiseModel):
    """The MLP gives the velocity of a straight path from noise (time 0) to the sample (time 1)."""

    def error(self, y: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
        time = torch.rand(*y.shape[:-1], 1, generator=generator, device=y.device)
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        velocity: Tensor = self(noise + time * (y - noise), time, context)
        return (velocity.float() - (y - noise)).square().mean(dim=-1)

    def sample(self, noise: Tensor, context: Tensor) -> Tensor:
        y = noise
        for step in range(self.steps):
            time = torch.full((*y.shape[:-1], 1), step / self.steps, device=y.device)
            y = y + self(y, time, context).float() / self.steps
        return y


class Diffusion(NoiseModel):
    """The noise that a sample was mixed with, at one of the levels of a cosine schedule, is foretold (HMA, Eq. 3).

    The MLP gives it as a velocity (Salimans & Ho 2022, arXiv 2202.00512): noise = signal * velocity + spread * mixed.
    So the clean sample is no quotient of small numbers where nearly all is noise.
    """

    def __init__(self, config: DiffusionHeadConfig, size: int, features: int, known: int, layers: int) -> None:
        super().__init__(config, size, features, known, layers)
        self.levels, self.clip = config.train_steps, config.clip
        self.kept: Tensor
        self.register_buffer("kept", cosine_schedule(self.levels), persistent=False)

    def error(self, y: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
        level = torch.randint(1, self.levels + 1, (*y.shape[:-1], 1), generator=generator, device=y.device)
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        signal, spread = self.kept[level].sqrt(), (1 - self.kept[level]).sqrt()
        mixed = signal * y + spread * noise
        velocity: Tensor = self(mixed, level / self.levels, context)
        predicted = signal * velocity.float() + spread * mixed
        return (predicted - noise).square().mean(dim=-1)

    def sample(self, noise: Tensor, context: Tensor) -> Tensor:
        """DDIM without added noise (Song et al. 2021, Eq. 12), the predicted clean sample clipped in every step."""
        y = noise
        levels = [round(self.levels * (1 - step / self.steps)) for step in range(self.steps + 1)]
        signal, spread = self.kept.sqrt(), (1 - self.kept).sqrt()
        for now, after in zip(levels, levels[1:], strict=False):
            time = torch.full((*y.shape[:-1], 1), now / self.levels, device=y.device)
            clean = signal[now] * y - spread[now] * self(y, time, context).float()
            clean = clean.clamp(-self.clip, self.clip)
            y = signal[after] * clean + spread[after] * (y - signal[now] * clean) / spread[now]
        return y


def cosine_schedule(levels: int) -> Tensor:
    """The share of a sample's variance that is kept at noise level 0 (all of it) to ``levels``, float32.

    Nichol & Dhariwal 2021, Eq. 17; a level keeps at least a thousandth of the one before.
    """
    angle = (torch.arange(levels + 1, dtype=torch.float64) / levels + 0.008) / 1.008 * math.pi / 2
    kept = angle.cos().square()
    steps = (kept[1:] / kept[:-1]).clamp(min=0.001)
    return torch.cat((torch.ones_like(steps[:1]), steps)).cumprod(dim=0).float()


def noise_model(config: SoftHeadConfig, size: int, features: int, known: int, layers: int) -> NoiseModel:
    """The noise model that a configuration asks for; see :class:`NoiseModel` for the arguments."""
    if isinstance(config, DiffusionHeadConfig):
        return Diffusion(config, size, features, known, layers)
    return Flow(config, size, features, known, layers)


class SoftHead(nn.Module):
    """Soft tokens in, soft tokens out. Implements :class:`hma_gym.dynamics.heads.TokenHead`."""

    kind = "soft"

    def __init__(self, config: SoftHeadConfig, width: int) -> None:
        super().__init__()
        self.config = config
        rows, columns = config.grid
        self.positions = rows * columns // config.patch**2
        size = config.channels * config.patch**2
        self.previous_in = nn.Linear(size, width)
        self.current_in = nn.Linear(size, width)
        self.drawn_size: tuple[int, int, int] | None = (rows, columns, config.channels)
        self.drawn_in = nn.Linear(2 * size, width)
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self.mean_out = nn.Linear(width, size)
        self.gate_out = nn.Linear(width, size)
        self.flow = noise_model(config, size, width, size, config.flow_layers)
        self.of_latents = isinstance(config, DiffusionHeadConfig) and config.predicts == "latent"
        self.residual_rms: Tensor
        self.register_buffer("residual_rms", torch.tensor(config.change_scale))
        for layer in (self.mean_out, self.gate_out):
            silence(layer)
        nn.init.constant_(self.gate_out.bias, CLOSED)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return []

    def readouts(self) -> list[nn.Parameter]:
        return [weight_of(self.mean_out), weight_of(self.gate_out), weight_of(self.flow.condition)]

    def check(self, tokens: Tensor) -> None:
        check_soft_tokens(tokens, self.config.grid[0] * self.config.grid[1], self.config.channels)

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

    def _context(self, features: Tensor, mean: Tensor) -> Tensor:
        return torch.cat((features, (mean / self.config.change_scale).to(features.dtype)), dim=-1)

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
        y = self._patch(tokens) if self.of_latents else residual.detach() / self.residual_rms
        flow_loss = (self.flow.error(y, self._context(features_BTND, mean.detach()), generator) * weight).sum()
        loss = mean_loss + config.flow_weight * flow_loss
        return loss, {"mean_loss": mean_loss.detach(), "flow_loss": flow_loss.detach()}

    def sample(self, features_BND: Tensor, scene: Scene, draw: Draw, temperature: float) -> tuple[Tensor, Tensor]:
        order_BN = draw.order().uniform(self.positions)
        mean = self._mean(features_BND, scene)
        if temperature == 0:
            return scene.previous + self._unpatch(mean), order_BN
        noise = temperature * draw.part(0).normal(*mean.shape[1:])
        y = self.flow.sample(noise, self._context(features_BND, mean))
        if self.of_latents:
            return self._unpatch(y), order_BN
        return scene.previous + self._unpatch(mean + y * self.residual_rms), order_BN

    def merge(self, old: Tensor, new: Tensor, masked_BN: Tensor) -> Tensor:
        return self._unpatch(torch.where(masked_BN[..., None], self._patch(new), self._patch(old)))

    def blank(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)
