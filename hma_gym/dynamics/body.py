"""The robot's own body: where it will be next, and what it looks like there.

A camera that stands still shows the robot as a function of ``agent_pos``, and ``agent_pos`` moves mostly as the actions
say. Both are cheap to learn from single frames and short histories, thousands of times cheaper than with the trunk, so
they are learned first and by themselves:

- ``coast`` foretells the next agent_pos from the last few changes and actions, trained on its own rollouts;
- ``look`` draws the tokens of a frame from agent_pos alone (soft tokens only).

The trunk is given both, and is left with what they cannot know: the objects, contacts, and what hides what. A rollout
is anchored by them: a background or an arm that was drawn wrong once is drawn right at the next frame.

Shape legend: B rows, T frames, K steps of history, P agent_pos dims, A action dims x stride, S tokens of a frame,
C channels, M pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.domains import Domain
from hma_gym.nn.parameters import ParameterGroup, silence


@dataclass(frozen=True)
class BodyConfig:
    """The body's two networks.

    Attributes:
        history: K, how many past changes and actions ``coast`` is told.
        octaves: positions are shown also as sines and cosines at so many scales, each twice as fine as the one before.
        coast_width: width of ``coast``.
        look_width, look_layers: width and residual layers of ``look``.
    """

    history: int = 3
    octaves: int = 4
    coast_width: int = 256
    look_width: int = 512
    look_layers: int = 3


@dataclass(frozen=True)
class Pose:
    """Proprioception before some frames; leading dims (...) are equal.

    Attributes:
        agent_pos: (..., P), own units.
        motions: (..., K, P), its last changes, own units, the latest first.
        known: (..., K) bool, False where a change is not known: before the first frame of a clip inside an episode.
        actions: (..., K, A), the normalised actions that led to these changes.
        acted: (..., K) bool, False where no such action is known.
    """

    agent_pos: Tensor
    motions: Tensor
    known: Tensor
    actions: Tensor
    acted: Tensor

    def rows(self, rows: Tensor | slice) -> Pose:
        """Of some rows only."""
        return Pose(self.agent_pos[rows], self.motions[rows], self.known[rows], self.actions[rows], self.acted[rows])

    def narrowed(self, state_dim: int, action_size: int) -> Pose:
        """Without the padding of narrower domains."""
        return Pose(
            self.agent_pos[..., :state_dim],
            self.motions[..., :state_dim],
            self.known,
            self.actions[..., :action_size],
            self.acted,
        )

    def after(self, agent_pos: Tensor, action: Tensor, given: Tensor) -> Pose:
        """One step on: the new agent_pos (..., P) and the normalised action (..., A), given or not, that led to it."""
        return Pose(
            agent_pos,
            torch.cat(((agent_pos - self.agent_pos)[..., None, :], self.motions[..., :-1, :]), dim=-2),
            torch.cat((torch.ones_like(self.known[..., :1]), self.known[..., :-1]), dim=-1),
            torch.cat((action[..., None, :], self.actions[..., :-1, :]), dim=-2),
            torch.cat((given[..., None], self.acted[..., :-1]), dim=-1),
        )


def first_pose(agent_pos: Tensor, history: int, action_size: int, at_rest: Tensor) -> Pose:
    """The pose at a first frame: ``at_rest`` (...) bool says that nothing moved before; otherwise that is unknown."""
    lead = agent_pos.shape[:-1]
    return Pose(
        agent_pos,
        agent_pos.new_zeros(*lead, history, agent_pos.shape[-1]),
        at_rest[..., None].expand(*lead, history),
        agent_pos.new_zeros(*lead, history, action_size),
        torch.zeros(*lead, history, dtype=torch.bool, device=agent_pos.device),
    )


def clip_poses(agent_pos_BTP: Tensor, actions_BTA: Tensor, given_BT: Tensor, history: int, at_rest_B: Tensor) -> Pose:
    """The poses of all frames of a clip, as stepping through it would give them.

    Args:
        agent_pos_BTP: at each frame.
        actions_BTA: normalised, the action taken at each frame; ``given_BT`` False hides it.
        at_rest_B: whether nothing moved before the first frame.
    """
    change = agent_pos_BTP[:, 1:] - agent_pos_BTP[:, :-1]
    B, T, _ = agent_pos_BTP.shape
    motions, actions, acted, known = [], [], [], []
    time = torch.arange(T, device=agent_pos_BTP.device)
    for lag in range(1, history + 1):
        motions.append(F.pad(change, (0, 0, lag, 0))[:, :T])
        actions.append(F.pad(actions_BTA, (0, 0, lag, 0))[:, :T])
        acted.append(F.pad(given_BT, (lag, 0))[:, :T])
        known.append((time >= lag) | at_rest_B[:, None])
    return Pose(
        agent_pos_BTP, torch.stack(motions, 2), torch.stack(known, 2), torch.stack(actions, 2), torch.stack(acted, 2)
    )


class Body(nn.Module):
    """One domain's body. With an untrained ``coast`` the robot stands still, with an untrained ``look`` it looks as
    the mean of all frames.

    Args:
        domain: the embodiment.
        config: sizes.
        tokens: (S, C) of a frame's soft tokens; None where tokens are discrete, which are not drawn.
    """

    def __init__(self, domain: Domain, config: BodyConfig, tokens: tuple[int, int] | None) -> None:
        super().__init__()
        self.domain, self.config = domain, config
        P, A = domain.state_dim, domain.action_dim * domain.stride
        for name in ("state_mean", "state_std", "delta_std"):
            self.register_buffer(name, torch.tensor(getattr(domain, name), dtype=torch.float32), persistent=False)
        for name, bound in (("pose_low", -math.inf), ("pose_high", math.inf)):
            self.register_buffer(name, torch.full((P,), bound))
        self.feature_size = P * (1 + 2 * config.octaves)
        width, K = config.coast_width, config.history
        self.coast: nn.Sequential | None = None
        self.inertia: ExactLinear | None = None
        if P:
            history = K * (P + 1) + (K + 1) * (A + 1)
            self.inertia = ExactLinear(history, P)
            self.coast = nn.Sequential(
                ExactLinear(self.feature_size + history, width),
                nn.SiLU(),
                ExactLinear(width, width),
                nn.SiLU(),
                ExactLinear(width, width),
                nn.SiLU(),
                ExactLinear(width, P),
            )
            silence(self.coast[6])
            silence(self.inertia)
        self.look: nn.Sequential | None = None
        if P and tokens is not None:
            self.look = nn.Sequential(
                nn.Linear(self.feature_size, config.look_width),
                *(ResidualLayer(config.look_width) for _ in range(config.look_layers)),
                nn.LayerNorm(config.look_width),
                nn.Linear(config.look_width, tokens[0] * tokens[1]),
            )
            silence(self.look[-1])
            self.register_buffer("token_mean", torch.zeros(tokens))
            self.register_buffer("token_std", torch.ones(tokens))

    def features(self, agent_pos: Tensor) -> Tensor:
        """(..., P) in own units -> (..., feature_size): positions, and their sines and cosines at several scales,
        which tell positions finer than half precision does."""
        position = (agent_pos - self.get_buffer("state_mean")) / self.get_buffer("state_std")
        angles = [position * (math.pi / 2 * 2.0**octave) for octave in range(self.config.octaves)]
        return torch.cat((position, *(wave for angle in angles for wave in (angle.sin(), angle.cos()))), dim=-1)

    def coasted(self, pose: Pose, action: Tensor, given: Tensor) -> Tensor:
        """The next agent_pos (..., P) as far as motion and actions tell, without the picture; own units.

        Computed in float32 always: a position in half precision tells no velocity.

        Args:
            pose: up to now.
            action: (..., A), normalised; ``given`` (...) bool hides it where False.
        """
        if self.coast is None or self.inertia is None:
            return pose.agent_pos
        with _full_precision(pose.agent_pos.device):
            motions = torch.where(pose.known[..., None], pose.motions / self.get_buffer("delta_std"), 0.0)
            acted = torch.cat((given[..., None], pose.acted), dim=-1)
            actions = torch.cat((action[..., None, :], pose.actions), dim=-2)
            seen = (motions.flatten(-2), pose.known.float())
            done = (torch.where(acted[..., None], actions, 0.0).flatten(-2), acted.float())
            history = torch.cat((*seen, *done), dim=-1)
            change: Tensor = self.coast(torch.cat((self.features(pose.agent_pos), history), dim=-1))
            change = change + self.inertia(history)  # most of it is linear: how it moved and what it was told
            return pose.agent_pos + change * self.get_buffer("delta_std")

    def within(self, agent_pos: Tensor) -> Tensor:
        """agent_pos (..., P) held between the extremes of the training data: a table stops a hand, and beyond what was
        seen nothing is known."""
        return torch.minimum(torch.maximum(agent_pos, self.get_buffer("pose_low")), self.get_buffer("pose_high"))

    def set_pose_bounds(self, low_P: Tensor, high_P: Tensor) -> None:
        """The extremes of agent_pos in the training data, own units."""
        self.get_buffer("pose_low").copy_(low_P)
        self.get_buffer("pose_high").copy_(high_P)

    def drawn(self, agent_pos: Tensor) -> Tensor | None:
        """(..., P) in own units -> soft tokens (..., S, C) of the robot and what stands still; None if discrete."""
        if self.look is None:
            return None
        mean = self.get_buffer("token_mean")
        standard: Tensor = self.look(self.features(agent_pos)).float().unflatten(-1, mean.shape)
        return mean + standard * self.get_buffer("token_std")

    def set_token_statistics(self, mean_SC: Tensor, std_SC: Tensor) -> None:
        """Mean and standard deviation of the tokens over the training frames, from which ``look`` starts."""
        if self.look is not None:
            self.get_buffer("token_mean").copy_(mean_SC)
            self.get_buffer("token_std").copy_(std_SC)

    # ------------------------------------------------------------------ training by itself

    def parameter_groups(self) -> list[ParameterGroup]:
        """All alike."""
        return [ParameterGroup("body", [p for p in self.parameters() if p.requires_grad])]

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """``coast`` on its own rollouts, ``look`` on single frames; pseudo-Huber losses, for outliers are contacts
        and objects.

        In a quarter of the rows some dims are told at each step, as a picture does that corrects them (the fingers,
        which an object stops).

        Args:
            batch: ``agent_pos`` (B, T + 1, P), ``actions`` (B, T, A) normalised, ``at_rest`` (B,) bool, optional
                ``warm`` (): so many first transitions are shown, not foretold; ``poses`` (M, P) and ``tokens``
                (M, S, C).
            generator: all random choices come from it.
        """
        agent_pos, actions, device = batch["agent_pos"], batch["actions"], batch["agent_pos"].device
        B, T, P = len(agent_pos), actions.shape[1], agent_pos.shape[-1]
        told_BP = torch.rand(B, P, generator=generator, device=device) < 0.5
        told_BP &= torch.rand(B, 1, generator=generator, device=device) < 0.25
        given_B = torch.rand(B, generator=generator, device=device) > 0.03
        pose = first_pose(agent_pos[:, 0], self.config.history, actions.shape[-1], batch["at_rest"])
        warm = int(batch["warm"]) if "warm" in batch else 0
        for t in range(warm):
            pose = pose.after(agent_pos[:, t + 1], actions[:, t], given_B)
        errors = []
        for t in range(warm, T):
            found = self.coasted(pose, actions[:, t], given_B)
            errors.append((found - agent_pos[:, t + 1]) / self.get_buffer("delta_std"))
            pose = pose.after(torch.where(told_BP, agent_pos[:, t + 1], found), actions[:, t], given_B)
        coast_loss = _pseudo_huber(torch.stack(errors, dim=1))[given_B].mean()
        loss, metrics = coast_loss, {"coast_loss": coast_loss.detach()}
        if self.look is not None:
            drawn = self.drawn(batch["poses"])
            assert drawn is not None
            look_loss = _pseudo_huber((drawn - batch["tokens"]) / self.get_buffer("token_std").mean()).mean()
            loss = loss + look_loss
            metrics["look_loss"] = look_loss.detach()
        return loss, metrics


class ExactLinear(nn.Linear):
    """A linear layer that stays in float32 where others are put into a lower precision."""


class ResidualLayer(nn.Module):
    """x + MLP(norm(x)); begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        silence(self.down)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.down(F.silu(self.up(F.layer_norm(x, x.shape[-1:]))))
        return x + change


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside, on devices that know it."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _pseudo_huber(error: Tensor, width: float = 0.1) -> Tensor:
    return (error.square() + width**2).sqrt() - width
