"""The paper's published discrete models (Base and XL of HMA, arXiv 2502.04296) on our modules, with a cache.

:func:`read_published` maps a state dict of the reference implementation onto :class:`PublishedModel`: our trunk, our
discrete head, one chosen domain. What our modules do not have goes into the weights that they do: scales and offsets
of layer norms into the matrices behind them, the attention's scale into the queries.

Its time positions are learned and absolute, for W frames. Inside these the cache is exact; when they are used up, the
oldest frames are given up and the cache is made anew from the ``keep`` latest, once in W - keep frames. The reference
slides so at every frame, as ``keep = W - 1`` does; a smaller one means fewer frames of context and more speed.

An action belongs to the column of the frame in which it is taken, so a frame's column is final when the next step
says the action; it enters the cache in the same pass as the next frame's first unmasking pass.

Shape legend: B rows, T frames, S tokens of a frame (= N positions of it), Z action tokens, D width, W window, L layers,
A numbers of an action (of ``stride`` actions, in env units).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hma_gym.dynamics.heads import Draw, Scene
from hma_gym.dynamics.maskgit import MaskGITHead, MaskGITHeadConfig
from hma_gym.dynamics.masking import masked_after, unmask
from hma_gym.dynamics.model import ModulationBank
from hma_gym.errors import CheckpointError, InvalidAction, InvalidArgument
from hma_gym.nn import graphs
from hma_gym.nn.compiling import compile_methods
from hma_gym.nn.parameters import misfits
from hma_gym.nn.transformer import CACHED, Block, Cache, SpaceTimeTransformer, TrunkConfig

#: What the reference's configurations may say; other values belong to weights that were not published.
_REQUIRED: dict[str, Any] = {"qk_norm": False, "use_mup": False, "qkv_bias": False, "action_network": "concat+modulate"}

#: Values that the reference's configurations leave out.
_DEFAULTS: dict[str, Any] = {"T": 12, "S": 256, "action_token_size": 64, "mlp_ratio": 4.0, "num_factored_vocabs": 2}

#: Tensors of the reference that no frame depends on: they predict actions.
_UNUSED = ("action_mask_tokens", "action_out_projectors.")


@dataclass(frozen=True)
class PublishedConfig:
    """One published model with one domain.

    Attributes:
        trunk: geometry, with ``modulation="published"`` and ``positions="learned"``.
        head: grid and vocabulary of the tokens.
        action_tokens: Z.
        action_size: A.
        decode_steps, temperature: sampling of a frame; the reference's simulator takes 2 and 0.
    """

    trunk: TrunkConfig
    head: MaskGITHeadConfig = MaskGITHeadConfig(grid=(16, 16), vocabulary=(512, 512))
    action_tokens: int = 64
    action_size: int = 7
    decode_steps: int = 2
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.decode_steps < 1 or self.temperature < 0:
            raise InvalidArgument(
                "published model: decode_steps must be at least 1 and temperature at least 0, got "
                f"decode_steps={self.decode_steps}, temperature={self.temperature}."
            )


def published_trunk(layers: int = 32, width: int = 256, heads: int = 8, window: int = 12) -> TrunkConfig:
    """The trunk of the paper's Base; XL has width 1024."""
    return TrunkConfig(
        layers=layers, width=width, heads=heads, window=window, modulation="published", positions="learned"
    )


@dataclass(frozen=True)
class PublishedState:
    """B rollouts that began together.

    Attributes:
        tokens_BWS: the frames that the next one may depend on, the last of them the current one; older slots first,
            those before the first frame are meaningless.
        actions_BWA: the normalised actions taken in them, except in the current one.
        cache: keys and values of the frames before the current one.
        seed_B: int64; same seed and actions, same frames.
        filled: frames that hold a time position, the current one included.
        step: frames since the start.
        keep: frames that stay when the time positions are used up.
    """

    tokens_BWS: Tensor
    actions_BWA: Tensor
    cache: Cache
    seed_B: Tensor
    filled: int
    step: int
    keep: int

    def __len__(self) -> int:
        return len(self.seed_B)

    @property
    def tokens_BS(self) -> Tensor:
        """The current frame."""
        return self.tokens_BWS[:, -1]

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, those of the cache too; :meth:`of_tensors` puts others in their place."""
        names = ("tokens_BWS", "actions_BWA", "seed_B")
        cached = {f.name: getattr(self.cache, f.name) for f in dataclasses.fields(Cache)}
        return {**{name: getattr(self, name) for name in names}, **cached}

    def of_tensors(self, tensors: Mapping[str, Tensor]) -> PublishedState:
        """The same with other tensors, named as :meth:`tensors` does."""
        cache = Cache(**{f.name: tensors[f.name] for f in dataclasses.fields(Cache)})
        rest: dict[str, Any] = {name: tensors[name] for name in ("tokens_BWS", "actions_BWA", "seed_B")}
        return dataclasses.replace(self, cache=cache, **rest)

    def select(self, index_K: Tensor) -> PublishedState:
        """The rows ``index_K`` (int64), in that order, as a copy; rows may repeat."""
        return self.of_tensors({name: x[index_K] for name, x in self.tensors().items()})


class PublishedModel(nn.Module):
    """A published model of one domain: whole clips (:meth:`logits`) and cached rollouts (:meth:`step`)."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.config = config
        trunk, width = config.trunk, config.trunk.width
        self.trunk = SpaceTimeTransformer(trunk)
        self.head = MaskGITHead(config.head, width)
        self.positions = self.head.positions + config.action_tokens
        self.position_embedding = nn.Parameter(torch.zeros(trunk.window, self.positions, width))
        self.stem = nn.Sequential(
            nn.Linear(config.action_size, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width)
        )
        self.modulation = ModulationBank(trunk)
        self.action_mean: Tensor
        self.action_std: Tensor
        self.register_buffer("action_mean", torch.zeros(config.action_size))
        self.register_buffer("action_std", torch.ones(config.action_size))

    def _normal(self, action: Tensor) -> Tensor:
        return (action - self.action_mean) / self.action_std

    def _embed(self, tokens_BTS: Tensor, masked_BTN: Tensor, action_BTD: Tensor, first_B: Tensor | None) -> Tensor:
        """Columns (B, T, N + Z, D) of the frames at time positions ``first_B``, alike in all rows, and on; None: 0."""
        T = tokens_BTS.shape[1]
        tokens = self.head.embed_current(tokens_BTS, masked_BTN)
        actions = action_BTD[:, :, None].expand(-1, -1, self.config.action_tokens, -1)
        if first_B is None:
            position = self.position_embedding[:T]
        else:
            position = self.position_embedding.index_select(0, first_B[:1] + torch.arange(T, device=first_B.device))
        return torch.cat((tokens, actions), dim=2) + position

    def _told(self, action_BTA: Tensor) -> tuple[Tensor, Tensor]:
        """What an action is to the trunk, of normalised ones: (B, T, D), and the modulation (B, T, L, M, D)."""
        embedded = self.stem(action_BTA)
        return embedded, self.modulation(embedded)

    def _told_steps(self, action_BTA: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`_told`, for the trunk's ``extend``: where that is fused, in a form that it alone reads, with the
        same first dims."""
        return self._told(action_BTA)

    def _filled(
        self,
        features_BND: Tensor,
        before_BS: Tensor,
        now: tuple[Tensor, Tensor],
        draw: tuple[Tensor, Tensor],
        index: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unmasking pass ``index``: tokens (B, S) and mask (B, N) ``now`` to those after it; the first one's logits.

        ``draw``: seeds and steps, (B,) each.
        """
        config, (tokens, masked_BN) = self.config, now
        scene, noise = Scene(before_BS, None), Draw(*draw, index)
        new, order_BN = self.head.sample(features_BND, scene, noise, config.temperature)
        left = masked_after(index, config.decode_steps, self.head.positions)
        after = unmask(masked_BN, order_BN, left) if left else torch.zeros_like(masked_BN)
        logits = None if index else self.head.logits_out(features_BND)
        return self.head.merge(tokens, new, masked_BN), after, logits

    def compile_step(self, tuned: bool = False) -> None:
        """Let :meth:`step` run through ``torch.compile``: the trunk's blocks, embedding and unmasking, each by itself,
        and again for another number of rows; ``tuned`` as for the trunk's
        :meth:`~hma_gym.nn.transformer.SpaceTimeTransformer.compile_extend`."""
        self.trunk.compile_extend(tuned)
        compile_methods(self, ("_embed", "_told", "_filled"), fullgraph=True)

    def fuse_step(self, early: bool = False) -> None:
        """Let :meth:`step` and :meth:`observe` run by a few kernels of our own (a GPU, with Triton): a quarter as
        many as there are operations, the same numbers to float rounding. Weights must stay where and as they are from
        now on: products of them are made here.

        Args:
            early: begin each kernel while the one before it ends (NVIDIA, compute capability 9.0 or above); faster in
                bfloat16 and TF32, slower in full float32.

        Raises:
            MissingExtra: no Triton here; PyTorch for GPUs on Linux brings it along.
            InvalidArgument: a device without what these kernels need, or sampling that they do not do.
        """
        from hma_gym.dynamics.published_fused import FusedStep

        fused = FusedStep(self, early)
        for owner, name, method in (
            (self, "_embed", fused.embed),
            (self, "_told_steps", fused.told),
            (self, "_filled", fused.filled),
            (self.trunk, "extend", fused.extend),
        ):
            setattr(owner, name, method)

    def logits(self, tokens_BTS: Tensor, masked_BTN: Tensor, action_BTA: Tensor) -> Tensor:
        """All logits of a clip, without a cache: (B, T, N, F), F the sizes of the vocabulary's factors, in turn.

        Args:
            tokens_BTS: int64, at most W frames.
            masked_BTN: bool, True where a token is hidden.
            action_BTA: the action taken in each frame, env units.
        """
        embedded, modulation = self._told(self._normal(action_BTA))
        x = self.trunk(self._embed(tokens_BTS, masked_BTN, embedded, None), modulation)
        logits: Tensor = self.head.logits_out(x[:, :, : self.head.positions])
        return logits

    def start(self, tokens_BS: Tensor, seed_B: Tensor, keep: int | None = None) -> PublishedState:
        """Rollouts that begin at one frame each.

        Args:
            tokens_BS: int64.
            seed_B: int64.
            keep: frames that stay when the time positions are used up, 1 to W - 1; half of the window by default.

        Raises:
            InvalidArgument: another ``keep``.
        """
        B, W, device = len(tokens_BS), self.config.trunk.window, tokens_BS.device
        keep = max(W // 2, 1) if keep is None else keep
        if not 1 <= keep < W:
            raise InvalidArgument(f"keep must be in 1..{W - 1} (the window less one), got {keep}.")
        tokens_BWS = tokens_BS[:, None].repeat(1, W, 1)
        return PublishedState(
            tokens_BWS,
            torch.zeros(B, W, self.config.action_size, device=device),
            self.trunk.new_cache(B, self.positions, device, self.position_embedding.dtype),
            seed_B.to(device=device, dtype=torch.int64),
            filled=1,
            step=0,
            keep=keep,
        )

    @torch.no_grad()
    def observe(
        self, state: PublishedState, action_BA: Tensor, tokens_BS: Tensor, in_place: bool = False
    ) -> PublishedState:
        """As :meth:`step`, but the new frame is given: a prompt of several frames."""
        state = self._with_room(state, in_place)
        action = self.checked(state, action_BA)
        embedded, modulation = self._told_steps(action[:, None])
        clean = torch.zeros(len(state), 1, self.head.positions, dtype=torch.bool, device=action.device)
        x = self._embed(state.tokens_BS[:, None], clean, embedded, state.cache.step_B)
        _, cache = self.trunk.extend(x, modulation, state.cache, 1, in_place)
        return self._after(state, cache, action, tokens_BS)

    @torch.no_grad()
    def step(self, state: PublishedState, action_BA: Tensor, in_place: bool = False) -> tuple[PublishedState, Tensor]:
        """One frame of all rollouts.

        Args:
            action_BA: env units, taken in the current frame.
            in_place: reuse the cache memory of ``state``, which must not be used again; faster.

        Returns:
            The next state, and the logits (B, N, F) of the first unmasking pass.
        """
        action = self.checked(state, action_BA)
        step_B = torch.full((len(state),), state.step, dtype=torch.int64, device=state.seed_B.device)
        return self.advance(state, action, step_B, in_place)

    def advance(
        self, state: PublishedState, action_BA: Tensor, step_B: Tensor, in_place: bool
    ) -> tuple[PublishedState, Tensor]:
        """As :meth:`step`, of a normalised action; ``step_B`` is the state's step, on the device."""
        state = self._with_room(state, in_place)
        B, N, before = len(state), self.head.positions, state.tokens_BS
        embedded, modulation = self._told_steps(action_BA[:, None])
        tokens = torch.zeros_like(before)
        masked = torch.ones(B, N, dtype=torch.bool, device=tokens.device)
        x, cache = self.trunk.extend(
            self._embed(
                torch.stack((before, tokens), dim=1),
                torch.stack((torch.zeros_like(masked), masked), dim=1),
                embedded.expand(-1, 2, -1),
                state.cache.step_B,
            ),
            modulation.expand(-1, 2, -1, -1, -1),
            state.cache,
            commit=1,
            in_place=in_place,
        )
        draw = (state.seed_B, step_B)
        tokens, masked, first = self._filled(x[:, 1, :N], before, (tokens, masked), draw, 0)
        for index in range(1, self.config.decode_steps):
            x = self._embed(tokens[:, None], masked[:, None], embedded, cache.step_B)
            x, _ = self.trunk.extend(x, modulation, cache, commit=0)
            tokens, masked, _ = self._filled(x[:, 0, :N], before, (tokens, masked), draw, index)
        assert first is not None
        return self._after(state, cache, action_BA, tokens), first

    def checked(self, state: PublishedState, action_BA: Tensor) -> Tensor:
        """Actions (B, A) in env units to normalised ones; :class:`InvalidAction` where their shape is another."""
        if action_BA.shape != (len(state), self.config.action_size):
            raise InvalidAction(
                f"action must have the shape {(len(state), self.config.action_size)} (rows, action dims x stride), "
                f"got {tuple(action_BA.shape)}."
            )
        return self._normal(action_BA.float()).to(self.position_embedding.dtype)

    def _after(self, state: PublishedState, cache: Cache, action_BA: Tensor, tokens_BS: Tensor) -> PublishedState:
        actions = torch.cat((state.actions_BWA[:, 1:], torch.zeros_like(action_BA)[:, None]), dim=1)
        actions[:, -2] = action_BA
        tokens_BWS = torch.cat((state.tokens_BWS[:, 1:], tokens_BS[:, None]), dim=1)
        return PublishedState(tokens_BWS, actions, cache, state.seed_B, state.filled + 1, state.step + 1, state.keep)

    def _with_room(self, state: PublishedState, in_place: bool = False) -> PublishedState:
        """The same situation with a time position free for the next frame: fewer frames, a cache made anew."""
        keep = state.keep
        if state.filled < self.config.trunk.window:
            return state
        if in_place:  # at step 0 no frame of it is seen
            cache = dataclasses.replace(state.cache, step_B=torch.zeros_like(state.cache.step_B))
        else:
            cache = self.trunk.new_cache(len(state), self.positions, state.seed_B.device, state.cache.keys_BLWND.dtype)
        if keep > 1:
            tokens, action = state.tokens_BWS[:, -keep:-1], state.actions_BWA[:, -keep:-1]
            embedded, modulation = self._told_steps(action.to(self.position_embedding.dtype))
            clean = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
            _, cache = self.trunk.extend(
                self._embed(tokens, clean, embedded, None),
                modulation,
                cache,
                commit=keep - 1,
                in_place=True,
            )
        return dataclasses.replace(state, cache=cache, filled=keep)


# ------------------------------------------------------------------ as CUDA graphs


@dataclass
class _Recording:
    """Rollouts in memory that graphs change, the action and the step that these read; and by ``keep`` for steps that
    slide first, by 0 for others, the logits that a graph writes and what runs it."""

    memory: graphs.Memory
    action_BA: Tensor
    step_B: Tensor
    step: int
    runs: dict[int, tuple[Tensor, Callable[[], None]]]


class PublishedGraphs:
    """A published model's steps as CUDA graphs, recorded when a number of rows is first met (some seconds).

    A graph changes the rollouts in place, in memory that it lends; see :class:`hma_gym.dynamics.steppers.CudaGraphs`.

    Raises:
        InvalidArgument: weights that are not on a CUDA device.
    """

    def __init__(self, model: PublishedModel) -> None:
        reason = graphs.lacks_graphs(model.position_embedding.device)
        if reason:
            raise InvalidArgument(
                f"published graphs need weights on a CUDA device, got {reason}; call the model's own step."
            )
        self._model = model
        self._recordings: list[_Recording] = []

    @torch.no_grad()
    def step(self, state: PublishedState, action_BA: Tensor) -> tuple[PublishedState, Tensor]:
        """As :meth:`PublishedModel.step` with ``in_place``: gives up the state that it is given."""
        action_BA, given = self._model.checked(state, action_BA), state.tensors()
        recording = self._recording(given, action_BA)
        goes_on = recording.memory.take(given)
        recording.action_BA.copy_(action_BA)
        if recording.step != state.step:
            recording.step_B.fill_(state.step)
        slides = state.filled >= self._model.config.trunk.window
        which = state.keep if slides else 0
        if which not in recording.runs:
            recording.runs[which] = self._record(state, recording)
        first, run = recording.runs[which]
        run()
        recording.step = state.step + 1
        after = dataclasses.replace(state, filled=(which or state.filled) + 1, step=recording.step)
        return after if goes_on else after.of_tensors(recording.memory.lend("step_B")), first.clone()

    def _recording(self, given: dict[str, Tensor], action_BA: Tensor) -> _Recording:
        """Of these very rollouts, or one of their number whose rollouts are over, or a new one."""
        found = graphs.recorded_for(self._recordings, "step_B", given["step_B"])
        if found is None:
            memory = graphs.Memory(given, large=CACHED)
            found = _Recording(memory, action_BA.clone(), torch.zeros_like(given["seed_B"]), 0, {})
            self._recordings.append(found)
        return found

    def _record(self, state: PublishedState, recording: _Recording) -> tuple[Tensor, Callable[[], None]]:
        # The cache was given up with the state. A rehearsal writes where no frame is seen any more.
        memory, step_B = recording.memory, recording.step_B
        begin = state.of_tensors(memory.tensors)

        def step() -> Tensor:
            after, first = self._model.advance(begin, recording.action_BA, step_B, in_place=True)
            memory.take(after.tensors())
            step_B.add_(1)
            return first

        return graphs.record(step, step_B.device, memory.rehearsal(step, step_B))


# ------------------------------------------------------------------ the reference's state dicts


def read_published(tensors: Mapping[str, Tensor], config: Mapping[str, Any], domain: str) -> PublishedModel:
    """A model from the reference's state dict and its configuration.

    Args:
        tensors: of all domains; those of other domains are left.
        config: the fields of the reference's configuration file.
        domain: name of the domain to keep.

    Raises:
        CheckpointError: a configuration that no published model has, or tensors that are missing, foreign or of another
            shape.
    """
    fields = {**_DEFAULTS, **_REQUIRED, **config}
    wrong = {name: fields[name] for name, value in _REQUIRED.items() if fields[name] != value}
    if wrong:
        raise CheckpointError(
            f"published weights are read with {_REQUIRED}, got {wrong}; these weights are of another architecture."
        )
    known = sorted(name.split(".")[1] for name in tensors if name.startswith("action_preprocessor.") and "mean" in name)
    if domain not in known:
        raise CheckpointError(f"domain must be one of those in the weights, {known}, got {domain!r}.")
    side = round(fields["S"] ** 0.5)
    factors = int(fields["num_factored_vocabs"])
    size = round(fields["image_vocab_size"] ** (1 / factors))
    trunk = dataclasses.replace(
        published_trunk(fields["num_layers"], fields["d_model"], fields["num_heads"], fields["T"]),
        mlp_ratio=fields["mlp_ratio"],
    )
    model = PublishedModel(
        PublishedConfig(
            trunk,
            MaskGITHeadConfig(grid=(side, side), vocabulary=(size,) * factors),
            fields["action_token_size"],
            len(tensors[f"action_mlp.{domain}.model.0.weight"].T),
        )
    )
    own = _Translation(tensors, domain).run(model)
    bad = misfits(model, own)
    if bad:
        raise CheckpointError(
            f"published weights do not fit their configuration at {bad[:5]} ({len(bad)} in all); take both from one "
            "release."
        )
    model.load_state_dict(own)
    return model.eval().requires_grad_(False)


def load_published(folder: str | Path, domain: str) -> PublishedModel:
    """:func:`read_published` of ``config.json`` and ``model.safetensors`` in a folder, as the hub has them.

    Raises:
        CheckpointError: files that are missing or cannot be read, and as for :func:`read_published`.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"published weights: folder {str(folder)!r} must hold config.json and model.safetensors: {error}"
        ) from error
    return read_published(tensors, config, domain)


class _Translation:
    """Takes the reference's tensors one by one, so that what nobody took is known at the end."""

    def __init__(self, tensors: Mapping[str, Tensor], domain: str) -> None:
        self.tensors = tensors
        self.domain = domain
        self.taken: set[str] = set()

    def take(self, name: str) -> Tensor:
        """One tensor in float32."""
        if name not in self.tensors:
            raise CheckpointError(f"published weights lack the tensor {name!r}; download them again.")
        self.taken.add(name)
        return self.tensors[name].float()

    def linear(self, own: str, name: str) -> dict[str, Tensor]:
        """Weight and bias as they are."""
        return {f"{own}.{part}": self.take(f"{name}.{part}") for part in ("weight", "bias")}

    def behind_norm(self, own: str, norm: str, name: str, bias: bool) -> dict[str, Tensor]:
        """A linear layer that takes over scale and offset of the layer norm before it."""
        weight = self.take(f"{name}.weight")
        scale, offset = self.take(f"{norm}.weight"), self.take(f"{norm}.bias")
        shift = weight @ offset
        if bias:
            shift = shift + self.take(f"{name}.bias")
        return {f"{own}.weight": weight * scale, f"{own}.bias": shift}

    def run(self, model: PublishedModel) -> dict[str, Tensor]:
        """The tensors of ``model``. Raises :class:`CheckpointError` where any of the reference's is not understood."""
        own: dict[str, Tensor] = {}
        for i in range(len(model.config.head.vocabulary)):
            own[f"head.current_in.tables.{i}.weight"] = self.take(f"token_embed.factored_embeds.{i}.weight")
            own[f"head.previous_in.tables.{i}.weight"] = torch.zeros_like(own[f"head.current_in.tables.{i}.weight"])
        own["head.mask_embedding"] = self.take("token_embed.mask_token_embed")[0]
        own |= self.linear("head.logits_out", "out_x_proj")
        own["position_embedding"] = self.take("pos_embed_TSC")[0]
        mean, std = (self.take(f"action_preprocessor.{self.domain}.{name}") for name in ("mean", "std"))
        stride = model.config.action_size // len(mean)
        own["action_mean"], own["action_std"] = mean.repeat(stride), std.repeat(stride) + 1e-10
        for i in (0, 1, 3):
            own |= self.linear(f"stem.{i}", f"action_mlp.{self.domain}.model.{i}")
        banks: dict[str, list[Tensor]] = {"hidden": [], "hidden_bias": [], "out": [], "bias": []}
        for layer, block in enumerate(model.trunk.blocks):
            assert isinstance(block, Block)
            there, here = f"decoder.layers.{layer}", f"trunk.blocks.{layer}"
            own |= self.behind_norm(f"{here}.spatial.qkv", f"{there}.norm1", f"{there}.spatial_attn.qkv", bias=False)
            own |= self.linear(f"{here}.spatial.out", f"{there}.spatial_attn.proj")
            own[f"{here}.temporal.qkv.weight"] = self.take(f"{there}.temporal_attn.qkv.weight").clone()
            own |= self.linear(f"{here}.temporal.out", f"{there}.temporal_attn.proj")
            own |= self.behind_norm(f"{here}.up", f"{there}.norm2", f"{there}.mlp.fc1", bias=True)
            own |= self.linear(f"{here}.down", f"{there}.mlp.fc2")
            for name in ("spatial.qkv.weight", "spatial.qkv.bias", "temporal.qkv.weight"):
                own[f"{here}.{name}"][: block.config.width] *= block.head_dim**-0.5 / block.scale
            modulation = f"{there}.action_projectors.{self.domain}"
            own |= self.linear(f"{here}.mix", f"{modulation}.linear_out")
            banks["hidden"].append(self.take(f"{modulation}.adaLN_modulation.0.weight").T)
            banks["hidden_bias"].append(self.take(f"{modulation}.adaLN_modulation.0.bias"))
            banks["out"].append(self.take(f"{modulation}.adaLN_modulation.2.weight").T)
            banks["bias"].append(self.take(f"{modulation}.adaLN_modulation.2.bias"))
        own |= {f"modulation.{name}": torch.stack(parts) for name, parts in banks.items()}
        own["modulation.bias"] = own["modulation.bias"].flatten()
        self._refuse_unknown()
        return own

    def _refuse_unknown(self) -> None:
        others = ("action_preprocessor.", "action_mlp.")
        unknown = [
            name
            for name in self.tensors.keys() - self.taken
            if not name.startswith((*others, *_UNUSED)) and ".action_projectors." not in name
        ]
        if unknown:
            raise CheckpointError(
                f"published weights have tensors that no published model has: {sorted(unknown)[:5]} ({len(unknown)} in "
                "all); these weights are of another architecture."
            )
