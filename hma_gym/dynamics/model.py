"""The action-video dynamics model (HMA, arXiv 2502.04296, Sections 3.2 to 3.5).

Notable features:

- one trunk for all domains; each domain has its own action stem, modulation, state and action heads
  (:class:`DomainAdapter`), and rows of different domains share a batch;
- ``shifted`` conditioning (default): the column of frame t is given all tokens of frame t - 1 and the unmasked ones
  of frame t. A frame passes through the trunk once, its keys and values are final at once, and training every frame
  of a clip in one stream is exactly the cached inference condition. ``in_place`` is the paper's: the column of frame
  t holds frame t's own tokens, and a finished frame must pass again to enter the cache (it shares that pass with the
  first one of the next frame);
- forward, passive, policy and full dynamics are maskings of this one model: with or without the action given, with
  or without the frame revealed (Section 3.4);
- what the robot, and an object that it handles, will do and look like comes from its :mod:`~hma_gym.dynamics.body`,
  which the trunk is given;
- can be trained in part on its own rollouts, so that it learns to stay on course after its own errors.

Shape legend: B rows, T frames, S tokens of a frame, N trunk positions, Z extra positions (1 state + action tokens),
D width, L layers, M modulation vectors, A action dims (of the widest domain, padded), P agent_pos dims, X target dims,
O dims of the object's pose that the bodies foretell (X in the domains that have one, 0 where none has).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.domains import Domain
from hma_gym.dynamics.body import Body, BodyConfig
from hma_gym.dynamics.heads import Draw, Scene
from hma_gym.dynamics.mar import DiffusionHeadConfig, FlowHeadConfig, NoiseModel, SoftHead, SoftHeadConfig, noise_model
from hma_gym.dynamics.maskgit import MaskGITHead, MaskGITHeadConfig
from hma_gym.dynamics.masking import masked_after, training_mask, unmask
from hma_gym.dynamics.pose import Pose, clip_poses, first_pose
from hma_gym.dynamics.rollout import RolloutState, StepOutput
from hma_gym.errors import CheckpointError, InvalidAction, InvalidArgument, UnknownName
from hma_gym.nn.compiling import compile_methods, compiled_apart
from hma_gym.nn.parameters import ParameterGroup, silence, weight_of
from hma_gym.nn.transformer import BASE_WIDTH, Cache, SpaceTimeTransformer, TrunkConfig

Conditioning = Literal["shifted", "in_place"]

#: Where :meth:`Dynamics.act` draws from; tokens have the streams from 0 on.
ACTION_STREAM = -1

#: So many standard deviations of one step's change are the most that the trunk is told of one.
UNUSUAL = 10.0

#: Token heads by the name that a checkpoint has for them.
HEADS: dict[str, type[SoftHeadConfig] | type[MaskGITHeadConfig]] = {
    "soft": FlowHeadConfig,
    "diffusion": DiffusionHeadConfig,
    "vq": MaskGITHeadConfig,
}


@dataclass(frozen=True)
class DynamicsConfig:
    """The model.

    Attributes:
        trunk: geometry of the shared transformer.
        head: the kind of token and how it is sampled: a :class:`FlowHeadConfig` or :class:`DiffusionHeadConfig` (soft),
            or a :class:`MaskGITHeadConfig` (discrete).
        body: sizes of the networks that foretell and draw the robot itself.
        conditioning: see the module's docstring.
        action_tokens: extra positions that carry the action beside modulation (``concat``; the paper uses 64).
        decode_steps: unmasking steps a frame at inference, at least 1.
        temperature: of sampling; 0 is greedy.
        refresh: frames between two round trips of a rollout's tokens through the tokenizer (see
            :mod:`hma_gym.dynamics.refresh`), which are made by whoever has the tokenizer; 0 for none.
        mask_full, mask_minimum: share of training frames that are wholly masked, and the least ratio of the others.
        action_mask: share of training rows whose actions are hidden (passive, policy and full dynamics).
        state_noise: largest constant offset of the previous agent_pos (drift), in units of one step's standard change.
        rollout_share: share of training batches whose inputs are the model's own frames, under the true poses.
        rollout_max: longest own rollout before the training clip ends, in frames.
        state_weight, target_weight, action_weight: weights of these losses beside the tokens'.
    """

    trunk: TrunkConfig = TrunkConfig()
    head: SoftHeadConfig | MaskGITHeadConfig = FlowHeadConfig()
    body: BodyConfig = BodyConfig()
    conditioning: Conditioning = "shifted"
    action_tokens: int = 0
    decode_steps: int = 1
    temperature: float = 1.0
    refresh: int = 0
    mask_full: float = 0.8
    mask_minimum: float = 0.5
    action_mask: float = 0.05
    state_noise: float = 0.3
    rollout_share: float = 0.0
    rollout_max: int = 32
    state_weight: float = 0.5
    target_weight: float = 0.25
    action_weight: float = 0.1

    def __post_init__(self) -> None:
        if self.decode_steps < 1 or self.temperature < 0 or self.refresh < 0:
            raise InvalidArgument(
                "dynamics: decode_steps must be at least 1, temperature and refresh at least 0, got "
                f"decode_steps={self.decode_steps}, temperature={self.temperature}, refresh={self.refresh}."
            )
        if self.conditioning not in ("shifted", "in_place"):
            raise InvalidArgument(f"dynamics: conditioning must be 'shifted' or 'in_place', got {self.conditioning!r}.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, read back by :meth:`from_dict`; ``head["kind"]`` is a name of :data:`HEADS`."""
        fields = dataclasses.asdict(self)
        fields["head"]["kind"] = next(name for name, kind in HEADS.items() if type(self.head) is kind)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DynamicsConfig:
        """The inverse of :meth:`to_dict`; unknown or missing keys raise :class:`CheckpointError`."""
        head_fields = dict(fields.get("head", {}))
        kind = head_fields.pop("kind", None)
        if kind not in HEADS:
            raise CheckpointError(f"dynamics config: head kind must be one of {sorted(HEADS)}, got {kind!r}.")
        parts = {
            "trunk": _strict(TrunkConfig, fields.get("trunk", {})),
            "head": _strict(HEADS[kind], head_fields),
            "body": _strict(BodyConfig, fields.get("body", {})),
        }
        return _strict(cls, {**fields, **parts})


ConfigT = TypeVar("ConfigT")


def _strict(kind: type[ConfigT], fields: Mapping[str, Any]) -> ConfigT:
    """Build a config dataclass from JSON values that must name exactly its fields."""
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if set(fields) != known:
        raise CheckpointError(
            f"{kind.__name__} must have exactly the keys {sorted(known)}; unknown: {sorted(set(fields) - known)}, "
            f"missing: {sorted(known - set(fields))}. Another version of hma_gym wrote it: use that version."
        )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


class ModulationBank(nn.Module):
    """One domain's modulation of all layers, from the action's embedding, in one (adaln) or two products a frame.

    ``adaln`` has one linear map for all layers, ``residual`` an MLP a layer, as in the paper.
    """

    def __init__(self, trunk: TrunkConfig) -> None:
        super().__init__()
        self.shape = (trunk.layers, trunk.modulation_vectors, trunk.width)
        out = trunk.layers * trunk.modulation_vectors * trunk.width
        if trunk.modulation == "adaln":
            self.hidden: nn.Parameter | None = None
            self.hidden_bias: nn.Parameter | None = None
            self.out = nn.Parameter(torch.empty(1, trunk.width, out))
        else:
            self.hidden = nn.Parameter(torch.empty(trunk.layers, trunk.width, trunk.width))
            self.out = nn.Parameter(torch.empty(trunk.layers, trunk.width, out // trunk.layers))
            self.hidden_bias = nn.Parameter(torch.zeros(trunk.layers, trunk.width))
            nn.init.normal_(self.hidden, std=1.0 / math.sqrt(trunk.width))
        nn.init.normal_(self.out, std=0.1 / math.sqrt(trunk.width))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, action_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, L, M, D)."""
        if self.hidden is None or self.hidden_bias is None:
            y = F.silu(action_BTD) @ self.out[0]
        else:
            # a batch of products, one a layer: einsum would copy the weights first
            B, T, D = action_BTD.shape
            hidden = F.silu(torch.matmul(action_BTD.reshape(B * T, D), self.hidden) + self.hidden_bias[:, None])
            y = torch.matmul(hidden, self.out).transpose(0, 1).reshape(B, T, -1)
        modulation: Tensor = (y + self.bias).unflatten(-1, self.shape)
        return modulation


class DomainAdapter(nn.Module):
    """What belongs to one embodiment: body, action stem, modulation, and the heads for state, action and targets."""

    def __init__(self, domain: Domain, config: DynamicsConfig, tokens: tuple[int, int, int] | None) -> None:
        super().__init__()
        self.domain = domain
        self.body = Body(domain, config.body, tokens)
        width = config.trunk.width
        self.action_size = domain.action_dim * domain.stride
        for name in ("state_mean", "state_std", "delta_std", "target_mean", "target_std"):
            self.register_buffer(name, torch.tensor(getattr(domain, name), dtype=torch.float32), persistent=False)
        for name, numbers in (("chunk_mean", domain.action_mean), ("chunk_std", domain.action_std)):
            self.register_buffer(name, torch.tensor(numbers * domain.stride, dtype=torch.float32), persistent=False)
        first, second = nn.Linear(max(self.action_size, 1), width), nn.Linear(width, width)
        bound = math.sqrt(6.0 / (first.in_features + BASE_WIDTH))  # Xavier at the base width: the same at all widths
        nn.init.uniform_(first.weight, -bound, bound)
        nn.init.xavier_uniform_(second.weight, gain=0.1)
        nn.init.zeros_(first.bias)
        nn.init.zeros_(second.bias)
        self.stem = nn.Sequential(first, nn.SiLU(), second)
        self.no_action = nn.Parameter(torch.zeros(width))
        self.modulation = ModulationBank(config.trunk)
        self.state_in = nn.Linear(max(domain.state_dim, 1), width)
        pose_size = 2 * self.body.feature_size + 2 * domain.state_dim + 1
        self.pose = nn.Sequential(nn.Linear(pose_size, width), nn.SiLU(), nn.Linear(width, width))
        self.object: nn.Sequential | None = None
        if self.body.target_dim:
            self.object = nn.Sequential(nn.Linear(2 * self.body.object_size, width), nn.SiLU(), nn.Linear(width, width))
            silence(self.object[2])
        self.register_buffer("corrected", torch.ones(domain.state_dim))
        self.corrects = True  # whether any is not 0: known to the host, so that no step waits for the device
        self.register_load_state_dict_post_hook(_note_corrections)  # type: ignore[no-untyped-call]
        self.state_out = nn.Linear(width, max(domain.state_dim, 1))
        self.action_out = _action_head(config.head, max(self.action_size, 1), width)
        self.target_out: nn.Linear | None = None
        if domain.target_dim and not self.body.target_dim:
            self.target_out = nn.Linear(width, domain.target_dim)
            silence(self.target_out)
        for last in (self.state_out, self.pose[2]):
            silence(last)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Weights from the trunk's width to its width (or a multiple of it)."""
        weights = [weight_of(self.stem[2]), weight_of(self.pose[2]), self.modulation.out]
        if self.object is not None:
            weights.append(weight_of(self.object[2]))
        if self.modulation.hidden is not None:
            weights.append(self.modulation.hidden)
        return weights

    def readouts(self) -> list[nn.Parameter]:
        """Weights from the trunk's width to a size that does not grow with it."""
        action = self.action_out.condition if isinstance(self.action_out, NoiseModel) else self.action_out
        layers = (self.state_out, action, self.target_out)
        return [weight_of(layer) for layer in layers if layer is not None]

    def _action_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of an action chunk, (stride * A) each."""
        return self.get_buffer("chunk_mean"), self.get_buffer("chunk_std")

    def normalise_action(self, action: Tensor) -> Tensor:
        """Raw action chunks (..., stride * A) in env units to zero mean and unit variance."""
        mean, std = self._action_statistics()
        return (action - mean) / std

    def action_error(self, feature: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """The action head's loss, of features (..., D) and normalised chunks (..., stride * A): (...)."""
        if isinstance(self.action_out, NoiseModel):
            return self.action_out.error(action, feature, generator)
        mean: Tensor = self.action_out(feature)
        return (mean.float() - action).square().mean(dim=-1)

    def next_action(self, feature_BD: Tensor, draw: Draw, temperature: float) -> Tensor:
        """The action head: (B, D) -> normalised action chunks (B, stride * A): a mean, or a sample if it diffuses."""
        if isinstance(self.action_out, NoiseModel):
            return self.action_out.sample(temperature * draw.normal(self.action_size), feature_BD)
        action: Tensor = self.action_out(feature_BD)[..., : self.action_size]
        return action.float()

    def restore_action(self, action: Tensor) -> Tensor:
        """The inverse of :meth:`normalise_action`."""
        mean, std = self._action_statistics()
        return action * std + mean

    def embed_action(self, action: Tensor, given: Tensor) -> Tensor:
        """Normalised actions (..., stride * A) and where they are given (...) bool -> (..., D)."""
        if self.action_size == 0:
            return self.no_action.expand(*given.shape, -1)
        embedded: Tensor = self.stem(action)
        return torch.where(given[..., None], embedded, self.no_action.to(embedded.dtype))

    def embed_state(self, agent_pos: Tensor) -> Tensor:
        """agent_pos (..., P) in its own units -> (..., D); a constant where the domain has no state."""
        if self.domain.state_dim == 0:
            agent_pos = agent_pos.new_zeros(*agent_pos.shape[:-1], 1)
        else:
            agent_pos = (agent_pos - self.get_buffer("state_mean")) / self.get_buffer("state_std")
        embedded: Tensor = self.state_in(agent_pos)
        return embedded

    def embed_pose(self, pose: Pose, coasted: Tensor, coasted_targets: Tensor) -> Tensor:
        """The pose before a frame, its last change, and what ``coast`` foretells, (..., P) and (..., O) -> (..., D).

        Changes beyond anything usual are held: a quaternion that was replaced by its negative is such a one.
        """
        known, delta_std = pose.known[..., :1], self.get_buffer("delta_std")
        motion = torch.where(known, pose.motions[..., 0, :], 0.0)
        motion, next_motion = (torch.stack((motion, coasted - pose.agent_pos)) / delta_std).clamp(-UNUSUAL, UNUSUAL)
        both = torch.stack((pose.agent_pos, coasted))  # the poses before and after, at once
        before, after = self.body.features(both)
        embedded: Tensor = self.pose(torch.cat((before, motion, known.float(), after, next_motion), dim=-1))
        if self.object is not None:
            things = self.body.object_features(both, torch.stack((pose.targets, coasted_targets)))
            embedded = embedded + self.object(torch.cat((things[0], things[1]), dim=-1))
        return embedded

    def correction(self, feature: Tensor) -> Tensor:
        """The state head: (..., D) -> by how much ``coast`` is wrong, (..., P), in own units; P = 0 without a state."""
        error: Tensor = self.state_out(feature)[..., : self.domain.state_dim]
        return error.float() * self.get_buffer("delta_std")

    def next_state(self, feature: Tensor, coasted: Tensor) -> Tensor:
        """The next agent_pos of a rollout, (..., P): what ``coast`` foretells, corrected where that helps a rollout."""
        return coasted + self.get_buffer("corrected") * self.correction(feature)

    def targets(self, feature: Tensor, coasted_targets: Tensor) -> Tensor:
        """Privileged targets (..., X) in their own units: the pose of the object that the body foretells, (..., O), or
        what the auxiliary head makes of a feature (..., D)."""
        if self.target_out is None:
            return coasted_targets
        above_mean: Tensor = self.target_out(feature).float() * self.get_buffer("target_std")
        return self.get_buffer("target_mean") + above_mean


def _note_corrections(adapter: DomainAdapter, incompatible_keys: object = None) -> None:
    adapter.corrects = bool(adapter.get_buffer("corrected").any())


def _action_head(head: SoftHeadConfig | MaskGITHeadConfig, size: int, width: int) -> nn.Linear | NoiseModel:
    """A linear read-out, or with ``action_layers`` a noise model."""
    if isinstance(head, DiffusionHeadConfig) and head.action_layers:
        return noise_model(head, size, width, 0, head.action_layers)
    linear = nn.Linear(width, size)
    silence(linear)
    return linear


def _mean_where(value_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """Weighted mean; 0 where there is no weight at all."""
    return (value_BT * weight_BT).sum() / weight_BT.sum().clamp(min=1)


def _is_reserved(name: str) -> bool:
    """Whether torch cannot keep a module under this name."""
    return not name or "." in name or hasattr(nn.ModuleDict, name)


@dataclass(frozen=True)
class Condition:
    """What the trunk is told of some frames beside their tokens.

    Attributes:
        modulation: (B, T, L, M, D).
        extra: the extra positions, (B, T, Z, D).
        coasted, coasted_targets: next agent_pos and object's pose by motion and action alone, (B, T, P) and (B, T, O),
            own units.
        drawn, drawn_before: tokens that the body draws of the coasted and of the present pose, (B, T, S, C); S = C = 0
            where tokens are discrete.
    """

    modulation: Tensor
    extra: Tensor
    coasted: Tensor
    coasted_targets: Tensor
    drawn: Tensor
    drawn_before: Tensor

    def joined(self, others: Sequence[Condition], order_B: Tensor) -> Condition:
        """This one's rows and the others', put in order."""
        fields = [[getattr(part, f.name) for part in (self, *others)] for f in dataclasses.fields(self)]
        return Condition(*(torch.cat(parts)[order_B] for parts in fields))


@dataclass(frozen=True)
class Columns:
    """The trunk's output for some frames: token positions, the state position, the pooled feature; and what the body
    foretells: agent_pos, the object's pose and, with soft tokens, how the frame will look."""

    tokens_BTND: Tensor
    state_BTD: Tensor
    pooled_BTD: Tensor
    coasted_BTP: Tensor
    coasted_BTO: Tensor
    drawn: Tensor

    def after(self, frames: int) -> Columns:
        """Without the first frames; the object's pose, which is kept, in the layout that it has at a start."""
        return Columns(
            self.tokens_BTND[:, frames:],
            self.state_BTD[:, frames:],
            self.pooled_BTD[:, frames:],
            self.coasted_BTP[:, frames:],
            self.coasted_BTO[:, frames:].clone(memory_format=torch.contiguous_format),
            self.drawn[:, frames:],
        )


class Dynamics(nn.Module):
    """Forward, passive, policy and full dynamics over one or more domains.

    Args:
        config: the model.
        domains: the embodiments, in the order of their indices.
    """

    def __init__(self, config: DynamicsConfig, domains: Sequence[Domain]) -> None:
        super().__init__()
        names = [domain.name for domain in domains]
        if not names or len(set(names)) != len(names) or any(map(_is_reserved, names)):
            raise InvalidArgument(
                "dynamics: needs one or more domains with different names, without dots and other than the methods of "
                f"a dict, got {names}; rename them."
            )
        self.config = config
        self.domains = tuple(domains)
        width = config.trunk.width
        self.head: SoftHead | MaskGITHead = (
            SoftHead(config.head, width) if isinstance(config.head, SoftHeadConfig) else MaskGITHead(config.head, width)
        )
        self.trunk = SpaceTimeTransformer(config.trunk)
        self.positions = self.head.positions + 1 + config.action_tokens
        self.position_embedding = nn.Parameter(0.02 * torch.randn(self.positions, width))
        frames = config.trunk.window if config.trunk.positions == "learned" else 0
        self.time_embedding = nn.Parameter(torch.zeros(frames, self.positions, width)) if frames else None
        tokens = self.head.drawn_size
        self.adapters = nn.ModuleDict({domain.name: DomainAdapter(domain, config, tokens) for domain in domains})
        self.action_size = max(domain.action_dim * domain.stride for domain in domains)
        self.state_size = max(domain.state_dim for domain in domains)
        self.target_size = max(domain.target_dim for domain in domains)
        self.object_size = max(self.adapter(index).body.target_dim for index in range(len(domains)))
        self._whole_step, self._bodies_step = Dynamics._step, Dynamics._step_of_bodies

    def parameter_groups(self) -> list[ParameterGroup]:
        """How the parameters are trained at any width (muP: Yang et al. 2022, Table 8).

        Weights whose fan-in grows with the width, between hidden layers or to an output, have AdamW's rate divided by
        width / BASE_WIDTH; input weights, biases and embeddings do not. Only the trunk's matrices are for Muon: the
        others are banks of several matrices in one, or outputs.
        """
        ratio = self.config.trunk.width / BASE_WIDTH
        matrices = [weight_of(module) for module in self.trunk.modules() if isinstance(module, nn.Linear)]
        hidden, readouts = self.head.hidden_matrices(), self.head.readouts()
        for index in range(len(self.domains)):
            hidden += self.adapter(index).hidden_matrices()
            readouts += self.adapter(index).readouts()
        chosen = {id(parameter) for parameter in (*matrices, *hidden, *readouts)}
        rest = [p for p in self.parameters() if id(p) not in chosen and p.requires_grad]
        return [
            ParameterGroup("matrices", matrices, kind="matrix", width_ratio=ratio),
            ParameterGroup("hidden", hidden, width_ratio=ratio),
            ParameterGroup("readouts", readouts, width_ratio=ratio),
            ParameterGroup("other", rest, weight_decay_multiplier=0.0),
        ]

    def set_corrected(self, index: int, corrected_P: Tensor) -> None:
        """Which dims of a domain's agent_pos the trunk corrects in rollouts: 1, or 0 for those left to ``coast``.

        A body that was trained on its own rollouts errs in ways that cancel out over time; corrections of single steps
        can spoil this, and are needed where the picture knows more: at contacts.
        """
        self.adapter(index).get_buffer("corrected").copy_(corrected_P)
        _note_corrections(self.adapter(index))

    def freeze_bodies(self) -> None:
        """Leave the bodies as they were trained by themselves."""
        for index in range(len(self.domains)):
            self.adapter(index).body.requires_grad_(False)

    def compile_step(self) -> None:
        """Let a whole step run through ``torch.compile``, and one of the bodies alone; anew for each number of rows.

        Raises:
            InvalidArgument: several domains, of which only the data says which rows are whose.
        """
        if len(self.domains) > 1:
            raise InvalidArgument(
                f"a step can be compiled as a whole where a model has one domain, got {len(self.domains)}; compile its "
                "parts instead."
            )
        self._whole_step, self._bodies_step = (
            compiled_apart(function, fullgraph=False) for function in (Dynamics._step, Dynamics._step_of_bodies)
        )

    def compile_bodies(self) -> None:
        """Let what the bodies foretell and draw, and what the trunk is told of it, run through ``torch.compile``."""
        for index in range(len(self.domains)):
            adapter = self.adapter(index)
            compile_methods(adapter.body, ("coasted", "drawn"), fullgraph=False)
            compile_methods(adapter, ("embed_pose",), fullgraph=False)

    # ------------------------------------------------------------------ domains

    def domain_index(self, name: str) -> int:
        """Index of a domain by name; :class:`UnknownName` with the known ones otherwise."""
        names = [domain.name for domain in self.domains]
        if name not in names:
            raise UnknownName("domain", name, names)
        return names.index(name)

    def adapter(self, index: int) -> DomainAdapter:
        """The adapter of a domain by index."""
        module = self.adapters[self.domains[index].name]
        assert isinstance(module, DomainAdapter)
        return module

    def _groups(self, domain_B: Tensor) -> Iterator[tuple[DomainAdapter, Tensor | slice]]:
        """The adapters in use and their rows; one group of all rows, without a sync, where there is one domain."""
        if len(self.domains) == 1:
            yield self.adapter(0), slice(None)
            return
        for index in range(len(self.domains)):
            rows = (domain_B == index).nonzero()[:, 0]
            if len(rows):
                yield self.adapter(index), rows

    # ------------------------------------------------------------------ the trunk's input and output

    def normalise_actions(self, actions: Tensor, domain_B: Tensor) -> Tensor:
        """Raw action chunks (B, T, A) in env units, padded to the widest domain, to normalised ones."""
        result = torch.zeros_like(actions)
        for adapter, rows in self._groups(domain_B):
            result[rows, :, : adapter.action_size] = adapter.normalise_action(actions[rows, :, : adapter.action_size])
        return result

    def _condition(
        self, actions_BTA: Tensor, given_BT: Tensor, pose: Pose, domain_B: Tensor, drawn_before: Tensor | None = None
    ) -> Condition:
        """Modulation and extra positions from normalised actions and proprioception.

        ``drawn_before`` (B, T, S, C) is what the bodies draw of the present pose, where a rollout knows it already.
        """
        parts: list[tuple[Tensor | slice, Condition]] = []
        for adapter, rows in self._groups(domain_B):
            domain, body = adapter.domain, adapter.body
            chunk, given = actions_BTA[rows, :, : adapter.action_size], given_BT[rows]
            own = pose.rows(rows).narrowed(domain.state_dim, body.target_dim, adapter.action_size)
            coasted, targets = body.coasted(own, chunk, given)
            embedded = adapter.embed_action(chunk, given)
            extra = adapter.embed_state(own.agent_pos)[:, :, None]
            if self.config.action_tokens:  # alike but for their position embedding, as in the paper
                tokens = embedded[:, :, None].expand(-1, -1, self.config.action_tokens, -1)
                extra = torch.cat((extra, tokens.to(extra.dtype)), dim=2)
            drawn = self._drawn(body, coasted, targets)
            if drawn_before is None:
                before = self._drawn(body, own.agent_pos, own.targets)
            else:
                before = drawn_before[rows]
            modulation = adapter.modulation(embedded + adapter.embed_pose(own, coasted, targets))
            coasted = F.pad(coasted, (0, self.state_size - domain.state_dim))
            targets = F.pad(targets, (0, self.object_size - body.target_dim))
            parts.append((rows, Condition(modulation, extra, coasted, targets, drawn, before)))
        if len(parts) == 1:
            return parts[0][1]
        order = torch.cat([torch.as_tensor(rows) for rows, _ in parts]).argsort()
        return parts[0][1].joined([part for _, part in parts[1:]], order)

    def _drawn(self, body: Body, agent_pos: Tensor, targets: Tensor, as_it_is: bool = False) -> Tensor:
        """What poses (..., P) and (..., X) look like, (..., S, C); zeros for a domain without a state, S = C = 0 for
        discrete tokens. ``as_it_is``: never compiled."""
        if self.head.drawn_size is None:
            return agent_pos.new_zeros(*agent_pos.shape[:-1], 0, 0)
        drawn = Body.drawn(body, agent_pos, targets) if as_it_is else body.drawn(agent_pos, targets)
        if drawn is None:
            rows, columns, channels = self.head.drawn_size
            return agent_pos.new_zeros(*agent_pos.shape[:-1], rows * columns, channels)
        return drawn

    def _drawn_rows(self, agent_pos_BP: Tensor, targets_BO: Tensor, domain_B: Tensor) -> Tensor:
        """The same for rows of any domain, (B, S, C)."""
        rows, columns, channels = self.head.drawn_size or (0, 0, 0)
        result = agent_pos_BP.new_zeros(len(domain_B), rows * columns, channels)
        for adapter, chosen in self._groups(domain_B):
            P, X = adapter.domain.state_dim, adapter.body.target_dim
            poses = agent_pos_BP[chosen, :P], targets_BO[chosen, :X]
            # First frames come in other numbers than a batch has rows: not worth compiling for.
            result[chosen] = self._drawn(adapter.body, *poses, as_it_is=True).float()
        return result

    def _clip_pose(
        self,
        agent_pos_BTP: Tensor,
        targets_BTO: Tensor,
        actions_BTA: Tensor,
        given_BT: Tensor,
        at_rest_B: Tensor | None,
    ) -> Pose:
        """Proprioception of a clip, with the history that a rollout would have; in place there is none."""
        history = self.config.body.history
        if self.config.conditioning == "in_place":
            nothing = torch.zeros(agent_pos_BTP.shape[:2], dtype=torch.bool, device=agent_pos_BTP.device)
            return first_pose(agent_pos_BTP, targets_BTO, history, self.action_size, nothing)
        if at_rest_B is None:
            at_rest_B = torch.zeros(len(agent_pos_BTP), dtype=torch.bool, device=agent_pos_BTP.device)
        return clip_poses(agent_pos_BTP, targets_BTO, actions_BTA, given_BT, history, at_rest_B)

    def _rollout_pose(self, state: RolloutState) -> Pose:
        """Proprioception of the next column of a rollout, (B, 1, ...); a rollout starts at rest."""
        if self.config.conditioning == "in_place":
            nothing = torch.zeros(len(state), 1, dtype=torch.bool, device=state.step_B.device)
            place, thing = state.agent_pos_BP[:, None], state.targets_BO[:, None]
            return first_pose(place, thing, self.config.body.history, self.action_size, nothing)
        return state.pose.rows((slice(None), None))

    def _inputs(self, tokens_BTND: Tensor, extra_BTZD: Tensor) -> Tensor:
        return torch.cat((tokens_BTND, extra_BTZD.to(tokens_BTND.dtype)), dim=2) + self.position_embedding

    def _columns(self, x_BTND: Tensor, condition: Condition) -> Columns:
        x_BTND = F.layer_norm(x_BTND, x_BTND.shape[-1:])
        n = self.head.positions
        seen = (x_BTND[:, :, :n], x_BTND[:, :, n], x_BTND.mean(dim=2))
        return Columns(*seen, condition.coasted, condition.coasted_targets, condition.drawn)

    def _embed(self, current: Tensor, masked_BTN: Tensor, condition: Condition) -> Tensor:
        """Tokens of the frames themselves, masked where told, and what the body draws: (B, T, N, D)."""
        embedded = self.head.embed_current(current, masked_BTN)
        if self.head.drawn_size is None:
            return embedded
        return embedded + self.head.embed_drawn(condition.drawn, condition.drawn_before)

    def clip_features(
        self,
        current: Tensor,
        previous: Tensor,
        masked_BTN: Tensor,
        actions_BTA: Tensor,
        given_BT: Tensor,
        agent_pos_BTP: Tensor,
        targets_BTO: Tensor,
        domain_B: Tensor,
        at_rest_B: Tensor | None = None,
    ) -> Columns:
        """The trunk over a whole clip, without a cache: what training and the equivalence tests use.

        Args:
            current: tokens of frames 1..T (shifted) or 0..T (in place).
            previous: tokens of the frames before them; ignored in place.
            masked_BTN: True where a current token is hidden.
            actions_BTA: the normalised action that led to each frame; ``given_BT`` False hides it.
            agent_pos_BTP: agent_pos of the frame before each frame, raw units; in place, that of the frame itself where
                the frame is clean.
            targets_BTO: the object's pose, likewise; O = 0 where no domain has one.
            at_rest_B: bool, True where the clip begins at rest, as rollouts do; by default how it moves is unknown.

        Raises:
            InvalidArgument: learned time positions and a clip longer than the window.
        """
        pose = self._clip_pose(agent_pos_BTP, targets_BTO, actions_BTA, given_BT, at_rest_B)
        condition = self._condition(actions_BTA, given_BT, pose, domain_B)
        x = self._embed(current, masked_BTN, condition)
        if self.config.conditioning == "shifted":
            x = x + self.head.embed_previous(previous)
        x = self._inputs(x, condition.extra)
        if self.time_embedding is not None:
            if x.shape[1] > len(self.time_embedding):
                raise InvalidArgument(
                    f"clips must have at most {len(self.time_embedding)} frames (the trunk's window) with learned time "
                    f"positions, got {x.shape[1]}; draw shorter clips or use rotary positions."
                )
            x = x + self.time_embedding[: x.shape[1]]
        return self._columns(self.trunk(x, condition.modulation), condition)

    # ------------------------------------------------------------------ training

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked training (Section 3.3) on a batch of clips.

        Args:
            batch: ``tokens`` (B, T + 1, S...); optional ``actions`` (B, T, A) raw, ``agent_pos`` (B, T + 1, P) raw,
                ``targets`` (B, T + 1, X) raw (needed where bodies have an object), ``given`` (B, T) bool (False: no
                action is known), ``domain`` (B,), ``at_rest`` (B,) bool (True: the clip begins where an episode does).
                Without actions this is passive training. Where ``rollout_share`` > 0, T must be ``rollout_max`` + the
                clip's own length; teacher-forced rows use a part of it.
            generator: all random choices come from it.

        Returns:
            The loss and detached metrics.
        """
        config = self.config
        tokens = batch["tokens"]
        B, T, device = tokens.shape[0], tokens.shape[1] - 1, tokens.device
        domain_B = batch.get("domain", torch.zeros(B, dtype=torch.int64, device=device))
        agent_pos = batch.get("agent_pos", tokens.new_zeros(B, T + 1, self.state_size, dtype=torch.float32))
        if "actions" in batch:
            actions = self.normalise_actions(batch["actions"], domain_B)
            known = batch.get("given", torch.ones(B, T, dtype=torch.bool, device=device))
        else:
            actions = torch.zeros(B, T, self.action_size, device=device)
            known = torch.zeros(B, T, dtype=torch.bool, device=device)
        hidden_B = torch.rand(B, generator=generator, device=device) < config.action_mask
        given = known & ~hidden_B[:, None]
        previous, previous_pos = self.head.corrupt(tokens[:, :-1], generator), agent_pos[:, :-1]
        drift, thing_drift = self._drift(B, domain_B, generator)
        previous_pos, aimed_pos = previous_pos + drift, agent_pos + drift  # the picture does not undo a drift
        things = self._things(batch, B, T)
        previous_things = things[:, :-1] + thing_drift
        start = 0
        if config.rollout_share > 0:
            clip = T - config.rollout_max
            if clip < 1:
                raise InvalidArgument(
                    f"clips must be longer than rollout_max = {config.rollout_max} transitions, got {T}; draw longer "
                    "clips or lower rollout_max."
                )
            start = int(torch.randint(config.rollout_max + 1, (1,), generator=generator, device=device))
            if float(torch.rand((), generator=generator, device=device)) < config.rollout_share:
                seeds = torch.randint(2**31, (B,), generator=generator, device=device)
                previous = self._own_rollout(tokens, agent_pos, things, actions, known, domain_B, seeds, start + clip)
            stop = start + clip
            tokens, aimed_pos = tokens[:, start : stop + 1], aimed_pos[:, start : stop + 1]
            previous, previous_pos = previous[:, start:stop], previous_pos[:, start:stop]
            previous_things = previous_things[:, start:stop]
            actions, given, known, T = actions[:, start:stop], given[:, start:stop], known[:, start:stop], clip
        masked = training_mask(B, T, self.head.positions, config.mask_full, config.mask_minimum, generator)
        if config.conditioning == "shifted":
            predicted = torch.ones_like(given)
            at_rest = batch.get("at_rest") if start == 0 else None
            columns = self.clip_features(
                tokens[:, 1:], previous, masked, actions, given, previous_pos, previous_things, domain_B, at_rest
            )
        else:
            first_B = torch.randint(T, (B,), generator=generator, device=device)
            predicted = torch.arange(T, device=device) >= first_B[:, None]
            masked = masked & predicted[..., None]
            columns = self._in_place_columns(
                tokens, previous, masked, predicted, actions, given, previous_pos, previous_things, domain_B
            )
        scene = Scene(previous, columns.drawn)
        loss, metrics = self.head.loss(columns.tokens_BTND, tokens[:, 1:], scene, masked, generator)
        targets = batch["targets"][:, start + 1 : start + T + 1] if "targets" in batch else None
        for name, weight, value in self._side_losses(
            columns, aimed_pos[:, 1:], predicted, actions, known & ~given, targets, domain_B, generator
        ):
            loss = loss + weight * value
            metrics[name] = value.detach()
        return loss, metrics

    def _in_place_columns(
        self,
        tokens: Tensor,
        previous: Tensor,
        masked_BTN: Tensor,
        predicted_BT: Tensor,
        actions_BTA: Tensor,
        given_BT: Tensor,
        agent_pos_BTP: Tensor,
        targets_BTO: Tensor,
        domain_B: Tensor,
    ) -> Columns:
        """The paper's layout: clean columns up to a frame, then masked ones.

        A clean column is given its own frame's pose, a masked one that of the frame before, as in a rollout.
        """
        shown = torch.cat((previous[:, 1:], tokens[:, -1:]), dim=1)  # frames 1..T as a rollout would have them
        is_new = predicted_BT.view(*predicted_BT.shape, *(1,) * (tokens.ndim - 2))
        current = torch.cat((previous[:, :1], torch.where(is_new, tokens[:, 1:], shown)), dim=1)

        def place(before_BTE: Tensor) -> Tensor:
            own = torch.cat((before_BTE[:, 1:], before_BTE[:, -1:]), dim=1)  # the last frame is never context
            return torch.cat((before_BTE[:, :1], torch.where(predicted_BT[..., None], before_BTE, own)), dim=1)

        return self.clip_features(
            current,
            current,
            torch.cat((torch.zeros_like(masked_BTN[:, :1]), masked_BTN), dim=1),
            torch.cat((torch.zeros_like(actions_BTA[:, :1]), actions_BTA), dim=1),
            torch.cat((torch.zeros_like(given_BT[:, :1]), given_BT), dim=1),
            place(agent_pos_BTP),
            place(targets_BTO),
            domain_B,
        ).after(1)

    def _things(self, batch: Mapping[str, Tensor], rows: int, steps: int) -> Tensor:
        """The objects' poses of a batch, (B, T + 1, O)."""
        if not self.object_size:
            return batch["tokens"].new_zeros(rows, steps + 1, 0, dtype=torch.float32)
        if "targets" not in batch:
            raise InvalidArgument(
                "batch must have targets, the objects' poses, where a domain has object_turns > 0, got "
                f"{sorted(batch)}; add them, or make the domain with object_turns=0."
            )
        return batch["targets"][..., : self.object_size]

    def _drift(self, rows: int, domain_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, 1, P) and (B, 1, O): a constant offset of each row's agent_pos and object's place, of random size. White
        noise would hide the velocity."""
        device = domain_B.device
        level = self.config.state_noise * torch.rand(rows, 1, 1, generator=generator, device=device)
        drift = level * torch.randn(rows, 1, self.state_size, generator=generator, device=device)
        thing = level * torch.randn(rows, 1, self.object_size, generator=generator, device=device)
        for adapter, chosen in self._groups(domain_B):
            size = adapter.body.target_dim
            drift[chosen, :, : adapter.domain.state_dim] *= adapter.get_buffer("delta_std")
            thing[chosen, :, :size] *= adapter.body.get_buffer("object_step")[:size]
        return drift, thing

    @torch.no_grad()
    def _own_rollout(
        self,
        tokens: Tensor,
        agent_pos: Tensor,
        things: Tensor,
        actions: Tensor,
        known_BT: Tensor,
        domain_B: Tensor,
        seed_B: Tensor,
        frames: int,
    ) -> Tensor:
        """The model's own frames 0..frames-1, inputs for the training columns.

        Actions (normalised) and poses are the true ones: the bodies are trained by themselves, and the pictures are to
        follow them.
        """
        known = things[:, 0], self._drawn_rows(agent_pos[:, 0], things[:, 0], domain_B)
        state = self.start(tokens[:, 0], agent_pos[:, 0], seed_B, domain_B, known)
        kept = [state.tokens]
        for t in range(frames - 1):
            pose = state.pose.after(agent_pos[:, t + 1], things[:, t + 1], actions[:, t], known_BT[:, t])
            state, _ = self._step(state, actions[:, t], known_BT[:, t], True, None)
            state = dataclasses.replace(
                state,
                agent_pos_BP=pose.agent_pos,
                targets_BO=pose.targets,
                motions_BKP=pose.motions,
                target_motions_BKO=pose.target_motions,
                drawn=self._drawn_rows(pose.agent_pos, pose.targets, domain_B),
            )
            kept.append(state.tokens)
        torch.clear_autocast_cache()  # copies of weights made without gradients must not serve the training pass
        return torch.stack(kept, dim=1)

    def _side_losses(
        self,
        columns: Columns,
        agent_pos: Tensor,
        predicted_BT: Tensor,
        actions: Tensor,
        hidden_BT: Tensor,
        targets: Tensor | None,
        domain_B: Tensor,
        generator: torch.Generator,
    ) -> list[tuple[str, float, Tensor]]:
        """Losses of predicted states and targets and of hidden actions, each (name, weight, mean)."""
        config, B = self.config, len(domain_B)
        state_loss = target_loss = action_loss = columns.state_BTD.new_zeros((), dtype=torch.float32)
        for adapter, rows in self._groups(domain_B):
            share = len(columns.state_BTD[rows]) / B
            feature, domain, predicted = columns.state_BTD[rows], adapter.domain, predicted_BT[rows].float()
            if domain.state_dim:
                P = domain.state_dim
                error = columns.coasted_BTP[rows, :, :P] + adapter.correction(feature) - agent_pos[rows, :, :P]
                error = error / adapter.get_buffer("delta_std")
                wrong = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")
                state_loss = state_loss + share * _mean_where(wrong.mean(-1), predicted)
            if adapter.target_out is not None and targets is not None:
                error = adapter.targets(feature, columns.coasted_BTO) - targets[rows, :, : domain.target_dim]
                error = error / adapter.get_buffer("target_std")
                wrong = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=0.2)
                target_loss = target_loss + share * _mean_where(wrong.mean(-1), predicted)
            if adapter.action_size:
                wrong = adapter.action_error(feature, actions[rows, :, : adapter.action_size], generator)
                action_loss = action_loss + share * _mean_where(wrong, hidden_BT[rows].float())
        return [
            ("state_loss", config.state_weight, state_loss),
            ("target_loss", config.target_weight, target_loss),
            ("action_loss", config.action_weight, action_loss),
        ]

    # ------------------------------------------------------------------ rollouts

    def start(
        self,
        tokens: Tensor,
        agent_pos_BP: Tensor | None,
        seed_B: Tensor,
        domain: str | Tensor | None = None,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> RolloutState:
        """The state of B rollouts that begin at one real frame; the body reads off it where the object is.

        Args:
            tokens: of that frame, (B, S, C) float or (B, S) int64.
            agent_pos_BP: raw units; None for domains without a state.
            seed_B: int64; same seed and actions, same frames.
            domain: name, or int64 indices (B,), or None where the model has one domain.
            known: what :meth:`first_look` gives, where it was worked out before.

        Raises:
            InvalidArgument: tokens of another kind or grid than the model's, or no domain where there are several.
            UnknownName: no domain of this name.
        """
        self.head.check(tokens)
        B, device = len(tokens), tokens.device
        if domain is None and len(self.domains) > 1:
            raise InvalidArgument(
                f"domain must be named where a model has several, got None; choose of {[d.name for d in self.domains]}."
            )
        if isinstance(domain, Tensor):
            domain_B = domain
        else:
            index = 0 if domain is None else self.domain_index(domain)
            domain_B = torch.full((B,), index, dtype=torch.int64, device=device)
        if agent_pos_BP is None:
            agent_pos_BP = torch.zeros(B, self.state_size, device=device)
        cache = self.trunk.new_cache(B, self.positions, device, self.position_embedding.dtype)
        history, agent_pos_BP = self.config.body.history, agent_pos_BP.float()
        targets_BO, drawn = self.first_look(tokens, agent_pos_BP, domain_B) if known is None else known
        return RolloutState(
            tokens=tokens,
            agent_pos_BP=agent_pos_BP,
            targets_BO=targets_BO,
            motions_BKP=torch.zeros(B, history, self.state_size, device=device),
            target_motions_BKO=torch.zeros(B, history, self.object_size, device=device),
            drawn=drawn,
            actions_BKA=torch.zeros(B, history, self.action_size, device=device),
            acted_BK=torch.zeros(B, history, dtype=torch.bool, device=device),
            keys_BLWND=cache.keys_BLWND,
            values_BLWND=cache.values_BLWND,
            step_B=cache.step_B,
            seed_B=seed_B.to(device=device, dtype=torch.int64),
            domain_B=domain_B,
        )

    def first_look(self, tokens: Tensor, agent_pos_BP: Tensor, domain_B: Tensor) -> tuple[Tensor, Tensor]:
        """Where the bodies see the objects in first frames, (B, O), and how they draw these frames, (B, S, C)."""
        targets_BO = self._sighted(tokens, agent_pos_BP, domain_B)
        return targets_BO, self._drawn_rows(agent_pos_BP, targets_BO, domain_B)

    @torch.no_grad()
    def step(
        self, state: RolloutState, action_BA: Tensor | None, in_place: bool = False
    ) -> tuple[RolloutState, StepOutput]:
        """One frame of all rollouts: forward dynamics, or passive where ``action_BA`` is None.

        Args:
            action_BA: raw action chunks in env units, (B, stride * A), padded to the widest domain.
            in_place: reuse the cache memory of ``state``, which must not be used again; faster.

        Returns:
            The next state and what it shows.
        """
        given_B = torch.full((len(state),), action_BA is not None, device=state.step_B.device)
        if action_BA is None:
            return self._whole_step(self, state, torch.zeros_like(state.actions_BKA[:, 0]), given_B, in_place, None)
        return self._whole_step(self, state, self._normal(state, action_BA), given_B, in_place, None)

    @torch.no_grad()
    def step_of_bodies(self, state: RolloutState, action_BA: Tensor) -> tuple[RolloutState, StepOutput]:
        """As :meth:`step`, by the bodies alone: a fraction of the cost, and nothing of what only the trunk knows.

        Frames show robot, object and what stands still, each where it is foretold to be. The cache stays as it is, so a
        rollout that is stepped so must go on so. Features are zeros.

        Raises:
            InvalidArgument: a domain whose body draws nothing: one without agent_pos, or with discrete tokens.
        """
        given_B = torch.ones_like(state.domain_B, dtype=torch.bool)
        return self._bodies_step(self, state, self._normal(state, action_BA), given_B)

    def _step_of_bodies(
        self, state: RolloutState, action_BA: Tensor, given_B: Tensor
    ) -> tuple[RolloutState, StepOutput]:
        pose, tokens = self._rollout_pose(state).rows((slice(None), 0)), torch.zeros_like(state.tokens)
        agent_pos, things = torch.zeros_like(state.agent_pos_BP), torch.zeros_like(state.targets_BO)
        for adapter, rows in self._groups(state.domain_B):
            body, P, X = adapter.body, adapter.domain.state_dim, adapter.body.target_dim
            own = pose.rows(rows).narrowed(P, X, adapter.action_size)
            found, thing = body.coasted(own, action_BA[rows, : adapter.action_size], given_B[rows])
            drawn = body.drawn(found, thing)
            if drawn is None:
                raise InvalidArgument(
                    f"domain {adapter.domain.name!r} must have agent_pos and soft tokens for its body to draw frames; "
                    "step with the whole model."
                )
            agent_pos[rows, :P], things[rows, :X], tokens[rows] = found, thing, drawn.to(tokens.dtype)
        after = _after(state, tokens, tokens, agent_pos, things, action_BA, given_B)
        nothing = agent_pos.new_zeros(len(state), self.config.trunk.width)
        targets = F.pad(things, (0, self.target_size - things.shape[1]))
        return dataclasses.replace(after, step_B=state.step_B + 1), StepOutput(tokens, agent_pos, nothing, targets)

    def _normal(self, state: RolloutState, action_BA: Tensor) -> Tensor:
        """Checked and normalised actions of one step."""
        wanted = (len(state), self.action_size)
        if action_BA.shape != wanted:
            raise InvalidAction(
                f"action must have the shape {wanted} (rows, action dims x stride of the widest "
                f"domain), got {tuple(action_BA.shape)}; pad actions of narrower domains with zeros."
            )
        return self.normalise_actions(action_BA[:, None].float(), state.domain_B)[:, 0]

    @torch.no_grad()
    def observe(
        self, state: RolloutState, action_BA: Tensor, tokens: Tensor, agent_pos_BP: Tensor | None
    ) -> RolloutState:
        """As :meth:`step`, but the new frame is given (real), not generated: gives a rollout more context.

        Where the object is, a frame tells only in part, see :meth:`hma_gym.dynamics.body.Body.observed`.
        """
        given_B = torch.ones(len(state), dtype=torch.bool, device=state.step_B.device)
        action_BA, before = self._normal(state, action_BA), self._rollout_pose(state).rows((slice(None), 0))
        state, _ = self._step(state, action_BA, given_B, False, tokens)
        if agent_pos_BP is None:
            return state
        agent_pos_BP, targets_BO = agent_pos_BP.float(), state.targets_BO.clone()
        motions_BKP, target_motions_BKO = state.motions_BKP.clone(), state.target_motions_BKO.clone()
        motions_BKP[:, 0] = agent_pos_BP - before.agent_pos
        for adapter, rows in self._groups(state.domain_B):
            body, P, A = adapter.body, adapter.domain.state_dim, adapter.action_size
            if body.target_dim:
                own = before.rows(rows).narrowed(P, body.target_dim, A)
                seen = body.observed(own, action_BA[rows, :A], given_B[rows], tokens[rows], agent_pos_BP[rows, :P])
                targets_BO[rows, : body.target_dim] = seen.targets
                target_motions_BKO[rows, :, : body.target_dim] = seen.target_motions
        return dataclasses.replace(
            state,
            agent_pos_BP=agent_pos_BP,
            targets_BO=targets_BO,
            motions_BKP=motions_BKP,
            target_motions_BKO=target_motions_BKO,
            drawn=self._drawn_rows(agent_pos_BP, targets_BO, state.domain_B),
        )

    def _sighted(self, tokens: Tensor, agent_pos_BP: Tensor, domain_B: Tensor) -> Tensor:
        """The objects' poses read off first frames, (B, O); see :meth:`hma_gym.dynamics.body.Body.sighted`."""
        result = agent_pos_BP.new_zeros(len(tokens), self.object_size)
        for adapter, rows in self._groups(domain_B):
            size = adapter.body.target_dim
            if size:
                seen = adapter.body.sighted(tokens[rows], agent_pos_BP[rows, : adapter.domain.state_dim], None)
                result[rows, :size] = seen
        return result

    @torch.no_grad()
    def act(self, state: RolloutState) -> Tensor:
        """Policy dynamics: the action (B, stride * A) in env units that the data would take next (Section 3.4)."""
        hidden_B = torch.zeros(len(state), dtype=torch.bool, device=state.step_B.device)
        nothing_BA = torch.zeros_like(state.actions_BKA[:, 0])
        columns, _ = self._first_pass(state, nothing_BA, hidden_B, False)
        result = nothing_BA
        for adapter, rows in self._groups(state.domain_B):
            draw = Draw(state.seed_B[rows], state.step_B[rows], ACTION_STREAM)
            action = adapter.next_action(columns.state_BTD[rows, -1], draw, self.config.temperature)
            result[rows, : adapter.action_size] = adapter.restore_action(action)
        return result

    def _pass(
        self,
        cache: Cache,
        embedded_BTND: Tensor,
        condition: Condition,
        commit: int,
        in_place: bool,
    ) -> tuple[Columns, Cache]:
        x = self._inputs(embedded_BTND, condition.extra)
        if self.time_embedding is not None:
            time = cache.step_B[:, None] + torch.arange(x.shape[1], device=x.device)
            x = x + self.time_embedding[time.clamp(max=len(self.time_embedding) - 1)]
        x, cache = self.trunk.extend(x, condition.modulation, cache, commit, in_place)
        return self._columns(x, condition), cache

    def _first_pass(
        self, state: RolloutState, action_BA: Tensor, given_B: Tensor, in_place: bool
    ) -> tuple[Columns, Cache]:
        """All tokens of the new frame masked. In place, the last frame's clean column is committed by the same pass."""
        blank = self.head.blank(state.tokens)[:, None]
        masked = torch.ones(len(state), 1, self.head.positions, dtype=torch.bool, device=blank.device)
        pose = self._rollout_pose(state)
        if self.config.conditioning == "shifted":
            condition = self._condition(
                action_BA[:, None], given_B[:, None], pose, state.domain_B, state.drawn[:, None]
            )
            embedded = self._embed(blank, masked, condition) + self.head.embed_previous(state.tokens[:, None])
            return self._pass(state.cache, embedded, condition, 1, in_place)
        condition = self._condition(
            torch.stack((state.actions_BKA[:, 0], action_BA), dim=1),
            torch.stack((state.acted_BK[:, 0], given_B), dim=1),
            Pose(*(getattr(pose, f.name).repeat_interleave(2, dim=1) for f in dataclasses.fields(pose))),
            state.domain_B,
            state.drawn[:, None].repeat_interleave(2, dim=1),
        )
        shown = torch.cat((state.tokens[:, None], blank), dim=1)
        embedded = self._embed(shown, torch.cat((~masked, masked), dim=1), condition)
        columns, cache = self._pass(state.cache, embedded, condition, 1, in_place)
        return columns.after(1), cache

    def _next_pass(
        self,
        state: RolloutState,
        cache: Cache,
        tokens: Tensor,
        masked_BN: Tensor,
        action_BA: Tensor,
        given_B: Tensor,
    ) -> Columns:
        """A further unmasking pass over the new frame; nothing is committed, the first pass's column stays."""
        pose = self._rollout_pose(state)
        condition = self._condition(action_BA[:, None], given_B[:, None], pose, state.domain_B, state.drawn[:, None])
        embedded = self._embed(tokens[:, None], masked_BN[:, None], condition)
        past = cache
        if self.config.conditioning == "shifted":
            embedded = embedded + self.head.embed_previous(state.tokens[:, None])
            past = Cache(cache.keys_BLWND, cache.values_BLWND, state.step_B)
        return self._pass(past, embedded, condition, 0, False)[0]

    def _step(
        self, state: RolloutState, action_BA: Tensor, given_B: Tensor, in_place: bool, known: Tensor | None
    ) -> tuple[RolloutState, StepOutput]:
        """First pass, then unmasking; ``known`` tokens replace the generated ones."""
        config, positions = self.config, self.head.positions
        columns, cache = self._first_pass(state, action_BA, given_B, in_place)
        first = columns
        if known is None:
            masked_BN = torch.ones(len(state), positions, dtype=torch.bool, device=action_BA.device)
            tokens = self.head.blank(state.tokens)
            for step in range(config.decode_steps):
                if step:
                    columns = self._next_pass(state, cache, tokens, masked_BN, action_BA, given_B)
                draw = Draw(state.seed_B, state.step_B, step)
                scene = Scene(state.tokens, columns.drawn[:, 0])
                new, order_BN = self.head.sample(columns.tokens_BTND[:, 0], scene, draw, config.temperature)
                tokens = self.head.merge(tokens, new, masked_BN)
                if step + 1 < config.decode_steps:
                    masked_BN = unmask(masked_BN, order_BN, masked_after(step, config.decode_steps, positions))
        else:
            tokens = known
        agent_pos, targets = torch.zeros_like(state.agent_pos_BP), action_BA.new_zeros(len(state), self.target_size)
        for adapter, rows in self._groups(state.domain_B):
            P, X, feature = adapter.domain.state_dim, adapter.domain.target_dim, first.state_BTD[rows, 0]
            agent_pos[rows, :P] = adapter.body.within(adapter.next_state(feature, first.coasted_BTP[rows, 0, :P]))
            targets[rows, :X] = adapter.targets(feature, first.coasted_BTO[rows, 0, :X])
        drawn = first.drawn[:, 0].to(state.drawn.dtype)
        if any(adapter.corrects for adapter, _ in self._groups(state.domain_B)):
            drawn = self._drawn_rows(agent_pos, first.coasted_BTO[:, 0], state.domain_B)
        after = _after(state, tokens, drawn, agent_pos, first.coasted_BTO[:, 0], action_BA, given_B)
        after = dataclasses.replace(
            after, keys_BLWND=cache.keys_BLWND, values_BLWND=cache.values_BLWND, step_B=cache.step_B
        )
        return after, StepOutput(tokens, agent_pos, first.pooled_BTD[:, 0].float(), targets)


def _after(
    state: RolloutState,
    tokens: Tensor,
    drawn: Tensor,
    agent_pos: Tensor,
    things_BO: Tensor,
    action_BA: Tensor,
    given_B: Tensor,
) -> RolloutState:
    """A step on, but for the cache: the new frame's tokens, what the bodies draw of it, agent_pos (B, P) and the
    object's pose, and the action."""
    pose = state.pose.after(agent_pos, things_BO, action_BA, given_B)
    return dataclasses.replace(
        state,
        tokens=tokens,
        drawn=drawn,
        agent_pos_BP=agent_pos,
        targets_BO=things_BO,
        motions_BKP=pose.motions,
        target_motions_BKO=pose.target_motions,
        actions_BKA=pose.actions,
        acted_BK=pose.acted,
    )
