"""The robot's own body, and what it handles: where they will be next, and what they look like there.

A camera that stands still shows the robot as a function of ``agent_pos`` and an object as one of its pose; and both
move mostly as the actions say, and as things do that are gripped or let go. All this is cheap to learn from single
frames and short histories, thousands of times cheaper than with the trunk, so it is learned first and by itself:

- ``coast`` foretells the next agent_pos and the object's next pose (see :mod:`hma_gym.dynamics.coast`), trained on its
  own rollouts;
- ``look`` draws the tokens of a frame from these alone (soft tokens only);
- ``sight`` reads the object's pose off a frame's tokens: where a rollout begins, and where real frames come in between.

The trunk is given what they foretell and draw, and is left with what they cannot know: what hides what, shadows,
whatever else moves. A rollout is anchored by them: an arm or an object that was drawn wrong once is drawn right at the
next frame, and an object cannot fade.

A domain whose ``object_turns`` is 0 has no object here.

Shape legend: B rows, T frames, K steps of history, P agent_pos dims, X dims of the object's pose (0 without one), A
action dims x stride, S tokens of a frame, C channels, M pictures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.domains import Domain
from hma_gym.dynamics.coast import OBJECT_STEP, PLACE, ManipulationCoast, RobotCoast, in_the_hand
from hma_gym.dynamics.look import Look, Things
from hma_gym.dynamics.pose import Pose, first_pose
from hma_gym.nn.parameters import ParameterGroup, silence
from hma_gym.nn.precision import full_precision
from hma_gym.nn.rotations import columns_of_matrix
from hma_gym.nn.waves import waves

#: Scale (m) of the place of an object in the hand, as ``look`` is told it.
IN_HAND = 0.1

#: An object is shown to ``look`` as the hand has it up to so far (m), beyond that ever fainter, and not at all from so
#: far on: an empty hand looks the same wherever the object is.
FADES, GONE = 0.08, 0.16

#: Dims of agent_pos after the hand's pose.
FINGERS = slice(7, None)

#: Tokens of each frame that ``look`` learns from in a step; how much of their choice is even; how much more those weigh
#: that show the object; and what it costs to let the object reach e times as far.
DRAWN_AT_ONCE, EVENLY, OBJECT_WEIGHT, REACH_COST = 24, 0.3, 3.0, 0.005

#: How far a reading moves the belief: by this share of its distance.
TRUST = 0.3

#: An object so far (m) above where objects lie is held or falls, and is read only if a finger is so far (m) from where
#: it was foretold.
ALOFT, SURPRISE = 0.01, 0.001


@dataclass(frozen=True)
class BodyConfig:
    """The body's networks.

    Attributes:
        history: K, how many past changes and actions ``coast`` is told.
        octaves: positions are shown also as sines and cosines at so many scales, each twice as fine as the one before.
        coast_width, coast_layers: of ``coast``.
        look_width, look_layers: width and residual layers of a token's network in ``look``.
        sight_width, sight_layers: width and residual layers of ``sight``.
    """

    history: int = 3
    octaves: int = 4
    coast_width: int = 384
    coast_layers: int = 3
    look_width: int = 160
    look_layers: int = 3
    sight_width: int = 384
    sight_layers: int = 2


class Body(nn.Module):
    """One domain's body. Untrained, everything stands (all but) still and looks as the mean of all frames, and the
    object is where it is on average.

    Args:
        domain: the embodiment.
        config: sizes.
        tokens: (rows, columns, C) of a frame's soft tokens; None where tokens are discrete, which are not drawn, and in
            which no object is seen.
    """

    def __init__(self, domain: Domain, config: BodyConfig, tokens: tuple[int, int, int] | None) -> None:
        super().__init__()
        self.domain, self.config = domain, config
        P = domain.state_dim
        self.target_dim = domain.target_dim if domain.object_turns and tokens is not None else 0
        for name in ("state_mean", "state_std", "delta_std", "target_mean", "target_std"):
            self.register_buffer(name, torch.tensor(getattr(domain, name), dtype=torch.float32), persistent=False)
        self.register_buffer("object_step", torch.tensor(OBJECT_STEP), persistent=False)
        for name, bound in (("pose_low", -math.inf), ("pose_high", math.inf)):
            self.register_buffer(name, torch.full((P,), bound))
        self.feature_size = P * (1 + 2 * config.octaves)
        self.object_size = (6 * (1 + 2 * config.octaves) + 12) if self.target_dim else 0
        self.coast: RobotCoast | None = None
        if P:
            kind = ManipulationCoast if self.target_dim else RobotCoast
            self.coast = kind(domain, config.history, config.octaves, config.coast_width, config.coast_layers)
        self.look: Look | None = None
        self.sight: nn.Sequential | None = None
        if P and tokens is not None:
            rows, columns, channels = tokens
            size = rows * columns * channels
            self.look = Look(
                (rows, columns),
                channels,
                self.feature_size,
                self.object_size,
                P,
                config.look_width,
                config.look_layers,
                projection=domain.camera_projection,
            )
            self.register_buffer("token_mean", torch.zeros(rows * columns, channels))
            self.register_buffer("token_std", torch.ones(rows * columns, channels))
            if self.target_dim:
                seen = size + self.feature_size + 2 * self.target_dim + 1
                self.sight = _residual(seen, config.sight_width, config.sight_layers, 5)

    def _standard(self, agent_pos: Tensor) -> Tensor:
        return (agent_pos - self.get_buffer("state_mean")) / self.get_buffer("state_std")

    def _standard_place(self, targets: Tensor) -> Tensor:
        """The object's position, (..., 3); of no dims without one."""
        place, mean, std = targets[..., PLACE], self.get_buffer("target_mean"), self.get_buffer("target_std")
        return (place - mean[PLACE]) / std[PLACE] if self.target_dim else targets

    def features(self, agent_pos: Tensor) -> Tensor:
        """agent_pos (..., P) in own units -> (..., feature_size)."""
        return waves(self._standard(agent_pos), self.config.octaves)

    def object_features(self, agent_pos: Tensor, targets: Tensor, faded: bool = False) -> Tensor:
        """The object's pose (..., X), in the room and in the hand -> (..., object_size); own units.

        With ``faded`` it is in the hand only where it is near (see :data:`FADES`).
        """
        if not self.target_dim:
            return targets
        with full_precision(agent_pos.device):
            _, place, thing = in_the_hand(agent_pos, targets)
        where = torch.cat((self._standard_place(targets), (place / IN_HAND).clamp(-4.0, 4.0)), dim=-1)
        where, turned = waves(where, self.config.octaves), columns_of_matrix(thing)
        if faded:
            near = ((GONE - place.norm(dim=-1, keepdim=True)) / (GONE - FADES)).clamp(0.0, 1.0)
            shown = torch.cat((torch.ones_like(place), near.expand_as(place)), dim=-1)
            where, turned = where * shown.tile(where.shape[-1] // shown.shape[-1]), turned * near
        return torch.cat((where, targets[..., 3:], turned), dim=-1)

    def coasted(self, pose: Pose, action: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """The next agent_pos (..., P) and object's pose (..., X) as far as motion and actions tell, without the
        picture; own units.

        Args:
            pose: up to now.
            action: (..., A), normalised; ``given`` (...) bool hides it where False.
        """
        if self.coast is None:
            return pose.agent_pos, pose.targets
        with full_precision(pose.agent_pos.device):
            agent_pos, targets = self.coast(pose, action, given, self.within)
            return agent_pos, targets

    def within(self, agent_pos: Tensor) -> Tensor:
        """agent_pos (..., P) held between the extremes of the training data: a table stops a hand, and beyond what was
        seen nothing is known."""
        return torch.minimum(torch.maximum(agent_pos, self.get_buffer("pose_low")), self.get_buffer("pose_high"))

    def set_floor(self, height: float) -> None:
        """Where an object lies in the training data, the height (m) of its position: no object falls deeper."""
        if isinstance(self.coast, ManipulationCoast):
            self.coast.set_floor(height)

    def set_pose_bounds(self, low_P: Tensor, high_P: Tensor) -> None:
        """The extremes of agent_pos in the training data, own units."""
        self.get_buffer("pose_low").copy_(low_P)
        self.get_buffer("pose_high").copy_(high_P)

    def drawn(self, agent_pos: Tensor, targets: Tensor) -> Tensor | None:
        """(..., P) and (..., X) in own units -> soft tokens (..., S, C) of the robot, the object and what stands still;
        None if discrete."""
        if self.look is None:
            return None
        return self._restored(self.look(self._things(agent_pos, targets)))

    def _restored(self, standard: Tensor, tokens: Tensor | slice = slice(None)) -> Tensor:
        """Some standardised tokens (..., T, C), or all, as they are."""
        mean, std = (self.get_buffer(name)[tokens] for name in ("token_mean", "token_std"))
        restored: Tensor = mean + standard.float() * std
        return restored

    def _things(self, agent_pos: Tensor, targets: Tensor) -> Things:
        return Things(
            self.features(agent_pos),
            self.object_features(agent_pos, targets, faded=True),
            self._standard(agent_pos),
            self._standard_place(targets),
            agent_pos,
            targets[..., PLACE],
        )

    def sighted(self, tokens: Tensor, agent_pos: Tensor, believed: Tensor | None) -> Tensor:
        """Where the object is, read off a frame: its pose (..., X), own units; X = 0 without one.

        With a belief, its place is corrected and its rotation kept, for a single frame shows only where around the
        upright axis an object is turned, and of that no more than one of its ``object_turns`` alike.

        Args:
            tokens: of the frame, (..., S, C); agent_pos: (..., P).
            believed: the pose that was expected, (..., X); None where nothing is known, as at a start.
        """
        if self.sight is None:
            return agent_pos.new_zeros(*agent_pos.shape[:-1], 0)
        place, turn = self._read(tokens, agent_pos, believed)
        if believed is not None:
            return torch.cat((place, believed[..., 3:]), dim=-1)
        angle = torch.atan2(turn[..., 1], turn[..., 0]) / self.domain.object_turns
        cosine, sine, nothing = angle.cos(), angle.sin(), torch.zeros_like(angle)
        return torch.cat((place, torch.stack((cosine, sine, nothing, -sine, cosine, nothing), dim=-1)), dim=-1)

    def _read(self, tokens: Tensor, agent_pos: Tensor, believed: Tensor | None) -> tuple[Tensor, Tensor]:
        """The object's position (..., 3), and (..., 2) cosine and sine of ``object_turns`` times its yaw."""
        assert self.sight is not None
        mean, std = self.get_buffer("target_mean"), self.get_buffer("target_std")
        known = torch.zeros_like(agent_pos[..., :1]) if believed is None else torch.ones_like(agent_pos[..., :1])
        prior = torch.zeros_like(known).expand(*known.shape[:-1], len(mean)) if believed is None else (believed - mean)
        fine = (4.0 * prior / std).sin() if believed is not None else prior
        seen = (tokens - self.get_buffer("token_mean")) / self.get_buffer("token_std")
        inputs = torch.cat((seen.flatten(-2), self.features(agent_pos), prior / std, fine, known), dim=-1)
        said: Tensor = self.sight(inputs).float()
        if believed is None:
            return mean[PLACE] + said[..., PLACE] * std[PLACE], said[..., 3:]
        return believed[..., PLACE] + said[..., PLACE] * std[PLACE], said[..., 3:]

    def observed(self, pose: Pose, action: Tensor, given: Tensor, tokens: Tensor, agent_pos: Tensor) -> Pose:
        """The pose after an action whose real frame and agent_pos are known; where the object is, they tell only in
        part.

        The body often knows better than a small frame shows: an object in the hand may be misread for as long as the
        hand stays there. Such a one is read only once the fingers do what the body did not foretell.

        Args:
            pose: before; leading dims (B,).
            action: (B, A), normalised; ``given`` (B,) bool hides it where False.
            tokens: of the real frame, (B, S, C); agent_pos: (B, P), own units.
        """
        foretold, believed = self.coasted(pose, action, given)
        if not self.target_dim:
            return pose.after(agent_pos, believed, action, given)
        along = _taken_along(pose, foretold, believed, agent_pos)
        believed = believed + F.pad(along, (0, believed.shape[-1] - along.shape[-1]))
        after = pose.after(agent_pos, believed, action, given)  # that it was believed elsewhere is no motion
        surprised = ((agent_pos - foretold)[..., FINGERS].abs() > SURPRISE).any(dim=-1, keepdim=True)
        told = self.sighted(tokens, agent_pos, believed) - believed
        share = TRUST * (surprised | ~self._aloft(believed))
        return dataclasses.replace(after, targets=believed + share * told)

    def _aloft(self, targets: Tensor) -> Tensor:
        """(..., 1) bool; False for a body that does not know where objects lie."""
        assert isinstance(self.coast, ManipulationCoast)
        floor = self.coast.get_buffer("floor")
        aloft: Tensor = (targets[..., 2:3] > floor + ALOFT) & floor.isfinite()
        return aloft

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
        """``coast`` on its own rollouts, ``look`` and ``sight`` on single frames; pseudo-Huber losses, for outliers are
        contacts.

        Without an object, in a quarter of the rows some dims are told at each step, as a picture does that corrects
        them (the fingers, which an object stops).

        Args:
            batch: ``agent_pos`` (B, T + 1, P), ``targets`` (B, T + 1, X), ``actions`` (B, T, A) normalised, ``at_rest``
                (B,) bool, optional ``warm`` (): so many first transitions are shown, not foretold; ``poses`` (M, P),
                ``places`` (M, X) and ``tokens`` (M, S, C).
            generator: all random choices come from it.
        """
        coast_loss, metrics = self._coast_loss(batch, generator)
        loss = coast_loss
        if self.look is not None:
            look_loss = self._look_loss(batch["tokens"], batch["poses"], batch["places"], generator)
            loss = loss + look_loss
            metrics["look_loss"] = look_loss.detach()
        if self.sight is not None:
            sight_loss = self._sight_loss(batch["tokens"], batch["poses"], batch["places"], generator)
            loss = loss + sight_loss
            metrics["sight_loss"] = sight_loss.detach()
        return loss, metrics

    def _coast_loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        agent_pos, targets, actions = batch["agent_pos"], batch["targets"], batch["actions"]
        B, T, P, device = len(agent_pos), actions.shape[1], agent_pos.shape[-1], agent_pos.device
        told_BP = torch.rand(B, P, generator=generator, device=device) < 0.5
        told_BP &= torch.rand(B, 1, generator=generator, device=device) < (0.0 if self.target_dim else 0.25)
        given_B = torch.rand(B, generator=generator, device=device) > 0.03
        pose = first_pose(agent_pos[:, 0], targets[:, 0], self.config.history, actions.shape[-1], batch["at_rest"])
        warm = int(batch["warm"]) if "warm" in batch else 0
        for t in range(warm):
            pose = pose.after(agent_pos[:, t + 1], targets[:, t + 1], actions[:, t], given_B)
        errors, object_errors = [], []
        for t in range(warm, T):
            found, thing = self.coasted(pose, actions[:, t], given_B)
            errors.append((found - agent_pos[:, t + 1]) / self.get_buffer("delta_std"))
            if self.target_dim:
                object_errors.append((thing - targets[:, t + 1]) / self.get_buffer("object_step"))
            found = torch.where(told_BP, agent_pos[:, t + 1], found)
            pose = pose.after(found, thing, actions[:, t], given_B)
        loss = _pseudo_huber(torch.stack(errors, dim=1))[given_B].mean()
        metrics = {"coast_loss": loss.detach()}
        if self.target_dim:
            object_loss = _pseudo_huber(torch.stack(object_errors, dim=1))[given_B].mean()
            loss = loss + object_loss
            metrics["object_loss"] = object_loss.detach()
        return loss, metrics

    def _look_loss(self, tokens: Tensor, agent_pos: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
        """Of some tokens of each frame, those that change more often and with less weight."""
        std_SC = self.get_buffer("token_std")
        often_S = std_SC.mean(dim=-1) + EVENLY * std_SC.mean()
        chosen = torch.multinomial(often_S, min(len(often_S), DRAWN_AT_ONCE), generator=generator)
        weight = often_S.mean() / often_S[chosen]
        return self.drawing_loss(tokens[:, chosen], agent_pos, places, chosen, weight)[1]

    def drawing_loss(
        self,
        tokens: Tensor,
        agent_pos: Tensor,
        places: Tensor,
        chosen: Tensor | slice = slice(None),
        weight: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (M, T, C) drawn of poses (M, P) and (M, X), and how wrong they are, those that show the object more.
        A little is to be gained by reaching less far.

        Args:
            tokens: the true ones, (M, T, C).
            chosen: which of a frame's tokens they are, indices (T,); all by default.
            weight: of each, (T,).
        """
        look = self.look
        assert look is not None
        things = self._things(agent_pos, places)
        drawn = self._restored(look(things, chosen), chosen)
        wrong = _pseudo_huber((drawn - tokens) / self.get_buffer("token_std").mean()).mean(dim=-1) * weight
        if look.object_anchors is None:
            return drawn, wrong.mean()
        shown = 1.0 + OBJECT_WEIGHT * look.nearness(things, chosen).detach()[..., 0].float()
        return drawn, (shown * wrong).mean() + REACH_COST * look.reach.abs().log()

    def _sight_loss(self, tokens: Tensor, agent_pos: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
        """Half of the frames with a belief that is wrong by up to some centimetres, half without."""
        half, device = len(tokens) // 2, tokens.device
        level = 0.03 * torch.rand(len(tokens) - half, 1, generator=generator, device=device).square()
        noise = torch.randn(len(tokens) - half, 3, generator=generator, device=device)
        believed = torch.cat((places[half:, :3] + level * noise, places[half:, 3:]), dim=-1)
        noisy = tokens + 0.05 * torch.randn(tokens.shape, generator=generator, device=device)
        blind = self._read(noisy[:half], agent_pos[:half], None)
        told = self._read(noisy[half:], agent_pos[half:], believed)
        place, turn = (torch.cat(parts) for parts in zip(blind, told, strict=True))
        yaw = self.domain.object_turns * torch.atan2(places[:, 4], places[:, 3])
        wrong = (place - places[:, :3]) / self.get_buffer("object_step")[PLACE]
        loss = _pseudo_huber(wrong, 1.0).mean() + _pseudo_huber(turn - torch.stack((yaw.cos(), yaw.sin()), -1)).mean()
        return loss


def _taken_along(pose: Pose, foretold: Tensor, believed: Tensor, agent_pos: Tensor) -> Tensor:
    """(..., 3): an object that goes with the hand is where the hand went, not where that was foretold to go."""
    hand, thing = (foretold - pose.agent_pos)[..., PLACE], (believed - pose.targets)[..., PLACE]
    moved, stayed_behind = thing.norm(dim=-1, keepdim=True), (thing - hand).norm(dim=-1, keepdim=True)
    share: Tensor = moved / (moved + stayed_behind + 1e-4)
    return share * (agent_pos - foretold)[..., PLACE]


class ResidualLayer(nn.Module):
    """x + MLP(norm(x)); begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        silence(self.down)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.down(F.silu(self.up(F.layer_norm(x, x.shape[-1:]))))
        return x + change


def _residual(inputs: int, width: int, layers: int, outputs: int) -> nn.Sequential:
    """A residual network that begins as zero."""
    last = nn.Linear(width, outputs)
    silence(last)
    return nn.Sequential(
        nn.Linear(inputs, width), *(ResidualLayer(width) for _ in range(layers)), nn.LayerNorm(width), last
    )


def _pseudo_huber(error: Tensor, width: float = 0.1) -> Tensor:
    return (error.square() + width**2).sqrt() - width
