"""The diffusion policy's networks, its training loss (DDPM) and its sampler (DDIM).

Chi et al. 2023, "Diffusion Policy" (arXiv 2303.04137): what was seen becomes a condition, and a network that cleans
noisy action sequences under it is trained with diffusers' DDPM schedule and sampled with its DDIM.

Shape legend: B samples, O observations (the present one last), H predicted actions, A action dims, P agent_pos dims,
X auxiliary targets, E numbers that the encoder makes of an image, G of the condition, H W image, D draws of noise a
sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.errors import InvalidArgument
from hma_gym.extras import require
from hma_gym.nn.parameters import ParameterGroup, default_parameter_groups
from hma_gym.policies.diffusion.denoisers import ActionTransformer, ConditionalUnet1d, Denoiser
from hma_gym.policies.diffusion.encoder import ImageEncoder, damage_images

_PURPOSE = "the diffusion policy"
_SCHEDULE = "squaredcos_cap_v2"


@dataclass(frozen=True)
class DiffusionConfig:
    """The shape of a diffusion policy.

    Attributes:
        image_size: (H, W) in pixels, multiples of 4.
        agent_pos_dim: P; 0 for a policy that sees the image alone.
        action_dim: A.
        network: ``unet`` or ``transformer``.
        observation_horizon: O, observations it sees: the present one and those before it.
        prediction_horizon: H, actions it predicts, beginning at the oldest observation.
        action_horizon: how many of them are carried out, from the present on.
        encoder_channels, encoder_blocks, keypoints: see :class:`~hma_gym.policies.diffusion.encoder.ImageEncoder`.
        condition_width: numbers of the condition for each observation.
        unet_channels: widths of the U-Net's levels.
        width, layers, heads: of the transformer.
        train_timesteps: noise levels.
        inference_steps: DDIM steps.
        prediction: what the network gives: ``sample`` (the clean actions) or ``epsilon`` (the noise).
        auxiliary_dim: X, numbers that an extra head learns to read off each image (where the object is, say); 0 for
            none. What it reads joins the condition.
        auxiliary_weight: of its loss beside the diffusion loss.
        noise_draws: D, noisy versions of each sample in one training step; they share one run of the encoder.
    """

    image_size: tuple[int, int] = (64, 64)
    agent_pos_dim: int = 9
    action_dim: int = 7
    network: Literal["unet", "transformer"] = "unet"
    observation_horizon: int = 1
    prediction_horizon: int = 16
    action_horizon: int = 4
    encoder_channels: tuple[int, int] = (32, 64)
    encoder_blocks: int = 1
    keypoints: int = 32
    condition_width: int = 128
    unet_channels: tuple[int, ...] = (64, 128)
    width: int = 128
    layers: int = 4
    heads: int = 4
    train_timesteps: int = 100
    inference_steps: int = 10
    prediction: Literal["sample", "epsilon"] = "sample"
    auxiliary_dim: int = 0
    auxiliary_weight: float = 0.5
    noise_draws: int = 2

    def __post_init__(self) -> None:
        for name in ("image_size", "encoder_channels", "unet_channels"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in (("network", ("unet", "transformer")), ("prediction", ("sample", "epsilon"))):
            if getattr(self, name) not in choices:
                raise InvalidArgument(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if any(side < 8 or side % 4 for side in self.image_size):
            raise InvalidArgument(f"image_size must be multiples of 4 of at least 8, got {self.image_size}.")
        if not 1 <= self.action_horizon <= self.prediction_horizon - self.observation_horizon + 1:
            raise InvalidArgument(
                "action_horizon must lie between 1 and prediction_horizon - observation_horizon + 1 = "
                f"{self.prediction_horizon - self.observation_horizon + 1}, got {self.action_horizon}."
            )
        halvings = 2 ** (len(self.unet_channels) - 1)
        if self.network == "unet" and self.prediction_horizon % halvings:
            raise InvalidArgument(
                f"prediction_horizon must be a multiple of {halvings} for a U-Net of {len(self.unet_channels)} levels, "
                f"got {self.prediction_horizon}."
            )
        if not 1 <= self.inference_steps <= self.train_timesteps:
            raise InvalidArgument(
                f"inference_steps must lie between 1 and train_timesteps = {self.train_timesteps}, got "
                f"{self.inference_steps}."
            )

    def to_json(self) -> dict[str, Any]:
        """As plain values, for a file."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Normalisation:
    """Statistics of the training data, each a tuple of numbers: agent_pos and the auxiliary targets are standardised,
    actions brought to [-1, 1]."""

    agent_pos_mean: tuple[float, ...]
    agent_pos_std: tuple[float, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    auxiliary_mean: tuple[float, ...] = ()
    auxiliary_std: tuple[float, ...] = ()


class DiffusionModel(nn.Module):
    """Encoder, denoiser and statistics; :class:`~hma_gym.training.loop.Trainable`.

    Args:
        config: the shape.
        normalisation: of the training data; None leaves it to ``load_state_dict`` (the statistics are buffers).

    Raises:
        MissingExtra: diffusers is not installed.
    """

    def __init__(self, config: DiffusionConfig, normalisation: Normalisation | None = None) -> None:
        super().__init__()
        self.config = config
        sizes = {
            "agent_pos_mean": config.agent_pos_dim,
            "agent_pos_std": config.agent_pos_dim,
            "action_low": config.action_dim,
            "action_high": config.action_dim,
            "auxiliary_mean": config.auxiliary_dim,
            "auxiliary_std": config.auxiliary_dim,
        }
        for name, size in sizes.items():
            values = torch.ones(size) if normalisation is None else torch.tensor(getattr(normalisation, name))
            if values.shape != (size,):
                raise InvalidArgument(f"normalisation.{name} must have {size} values, got {len(values)}.")
            self.register_buffer(name, values.float())
        self.agent_pos_mean: Tensor
        self.agent_pos_std: Tensor
        self.action_low: Tensor
        self.action_high: Tensor
        self.auxiliary_mean: Tensor
        self.auxiliary_std: Tensor
        self.encoder = ImageEncoder(config.image_size, config.encoder_channels, config.encoder_blocks, config.keypoints)
        # Without it the numbers would meet the denoiser's first activation raw, and it flattens the negative half.
        self.fuse = nn.Sequential(
            nn.Linear(self.encoder.size + config.agent_pos_dim + config.auxiliary_dim, config.condition_width),
            nn.Mish(),
            nn.Linear(config.condition_width, config.condition_width),
        )
        condition = config.observation_horizon * config.condition_width
        self.denoiser: Denoiser
        if config.network == "unet":
            self.denoiser = ConditionalUnet1d(config.action_dim, condition, config.unet_channels)
        else:
            self.denoiser = ActionTransformer(
                config.action_dim,
                condition,
                config.observation_horizon,
                config.prediction_horizon,
                config.width,
                config.layers,
                config.heads,
            )
        self.auxiliary: nn.Module | None = None
        if config.auxiliary_dim:
            self.auxiliary = nn.Sequential(
                nn.Linear(self.encoder.size, 128), nn.ReLU(), nn.Linear(128, config.auxiliary_dim)
            )
        ddpm = require("diffusers.schedulers.scheduling_ddpm", extra="diffusion", purpose=_PURPOSE)
        ddim = require("diffusers.schedulers.scheduling_ddim", extra="diffusion", purpose=_PURPOSE)
        settings = {
            "num_train_timesteps": config.train_timesteps,
            "beta_schedule": _SCHEDULE,
            "clip_sample": True,
            "prediction_type": config.prediction,
        }
        self._train_schedule = ddpm.DDPMScheduler(**settings)
        self._sample_schedule = ddim.DDIMScheduler(**settings, set_alpha_to_one=True)
        self._sample_schedule.set_timesteps(config.inference_steps)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the denoised actions, plus the Huber loss of the auxiliary head.

        ``batch``: ``images_BOHWC`` uint8, ``agent_pos_BOP``, ``actions_BHA`` in env units, and with an auxiliary head
        ``auxiliary_BOX`` in its own units.
        """
        config = self.config
        images_BOHWC = batch["images_BOHWC"]
        damaged = damage_images(_to_float(images_BOHWC.flatten(0, 1)), generator)
        points_BOE = self.encoder(damaged).unflatten(0, images_BOHWC.shape[:2])
        condition_BG, read_BOX = self._condition(points_BOE, batch["agent_pos_BOP"].float())
        repeated_BG = condition_BG.repeat(config.noise_draws, 1)
        clean_BHA = self._scaled(batch["actions_BHA"].float()).repeat(config.noise_draws, 1, 1)
        device = clean_BHA.device
        noise_BHA = torch.randn(clean_BHA.shape, generator=generator, device=device)
        timestep_B = torch.randint(config.train_timesteps, (len(clean_BHA),), generator=generator, device=device)
        noisy_BHA = self._train_schedule.add_noise(clean_BHA, noise_BHA, timestep_B)
        target_BHA = clean_BHA if config.prediction == "sample" else noise_BHA
        denoising = F.mse_loss(self.denoiser(noisy_BHA, timestep_B, repeated_BG).float(), target_BHA)
        metrics = {"denoising": denoising.detach()}
        if self.auxiliary is None:
            return denoising, metrics
        wanted_BOX = (batch["auxiliary_BOX"].float() - self.auxiliary_mean) / self.auxiliary_std
        auxiliary = F.smooth_l1_loss(read_BOX, wanted_BOX, beta=0.1)
        metrics["auxiliary"] = auxiliary.detach()
        return denoising + config.auxiliary_weight * auxiliary, metrics

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """Every weight, the usual way."""
        return default_parameter_groups(self)

    @torch.inference_mode()
    def sample(self, images_BOHWC: Tensor, agent_pos_BOP: Tensor, noise_BHA: Tensor) -> Tensor:
        """The actions to carry out next: (B, action_horizon, A) in env units.

        Args:
            images_BOHWC: uint8, oldest first.
            agent_pos_BOP: in its own units; of size 0 in the last dim for a policy without it.
            noise_BHA: standard normal; DDIM without added noise is a function of it.
        """
        points_BOE = self.encoder(_to_float(images_BOHWC.flatten(0, 1))).unflatten(0, images_BOHWC.shape[:2])
        condition_BG, _ = self._condition(points_BOE, agent_pos_BOP.float())
        x_BHA = noise_BHA
        for timestep in self._sample_schedule.timesteps:
            level_B = torch.full((len(x_BHA),), int(timestep), device=x_BHA.device)
            predicted = self.denoiser(x_BHA, level_B, condition_BG).float()
            x_BHA = self._sample_schedule.step(predicted, int(timestep), x_BHA, eta=0.0).prev_sample
        first = self.config.observation_horizon - 1
        chosen = x_BHA[:, first : first + self.config.action_horizon].clamp(-1, 1)
        return (chosen + 1) / 2 * (self.action_high - self.action_low) + self.action_low

    @torch.inference_mode()
    def read_auxiliary(self, images_BHWC: Tensor) -> Tensor:
        """What the auxiliary head reads off uint8 images: (B, X) in the targets' own units.

        Raises:
            InvalidArgument: the policy was trained without one.
        """
        if self.auxiliary is None:
            raise InvalidArgument(
                "this diffusion policy has no auxiliary head; train it with read_object=True on data that tells where "
                "the object is."
            )
        standard = self.auxiliary(self.encoder(_to_float(images_BHWC))).float()
        return torch.as_tensor(standard * self.auxiliary_std + self.auxiliary_mean)

    def _condition(self, points_BOE: Tensor, agent_pos_BOP: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G), made of each observation's points, agent_pos and reading, and the standardised reading (B, O, X).

        The denoising loss does not reach the reading, so that it stays what its own targets ask for.
        """
        read_BOX = points_BOE[..., :0] if self.auxiliary is None else self.auxiliary(points_BOE).float()
        pose_BOP = (agent_pos_BOP - self.agent_pos_mean) / self.agent_pos_std
        seen = torch.cat([points_BOE.float(), pose_BOP, read_BOX.detach()], dim=-1)
        return self.fuse(seen).flatten(1), read_BOX

    def _scaled(self, actions_BHA: Tensor) -> Tensor:
        span = (self.action_high - self.action_low).clamp_min(1e-6)
        return (actions_BHA - self.action_low) / span * 2 - 1


def _to_float(images: Tensor) -> Tensor:
    return images.float() * (2 / 255) - 1
