"""The trunk: a space-time transformer whose every block is modulated by the action (HMA, Section 3.2).

Notable features:

- attention within a frame is bidirectional, across time causal and windowed, per token position;
- frame t is one column of tokens; its modulation comes from that frame's action and is computed once per frame;
- ``forward`` runs whole clips (training), ``extend`` runs only new frames against a ring buffer (rollouts); both run
  the same blocks and agree to float tolerance at any length;
- two kinds of modulation: ``adaln`` (scale and shift of each normalised input, as in DiT) and ``residual`` (the
  paper's: a modulated, projected copy is added before the temporal attention); ``published`` is ``residual`` with the
  other details of the published weights, see :class:`PublishedBlock`;
- muP (Yang et al. 2022): attention scaled by 1/K, hidden matrices with variance 1/fan-in, see ``parameter_groups``
  of the dynamics model for the learning rates.

Shape legend: B rows, T frames, N tokens of a frame, D width, H heads, K head dim, L layers, W window,
M modulation vectors a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hma_gym.errors import InvalidArgument
from hma_gym.nn.activations import gelu_between
from hma_gym.nn.attention import Implementation, attend, attend_ring, ring_positions, rotary_angles, rotate, window_mask
from hma_gym.nn.compiling import compiled_apart

ModulationKind = Literal["adaln", "residual", "published"]
TimePositions = Literal["rotary", "learned"]

#: Width at which muP's multipliers are 1.
BASE_WIDTH = 256

#: The head dim at which muP's 1/K attention scale equals the classical 1/sqrt(K).
BASE_HEAD_DIM = 32


@dataclass(frozen=True)
class TrunkConfig:
    """Geometry of the trunk.

    Attributes:
        layers, width, heads: L, D and H; D must be divisible by 2 H (rotary positions pair dims).
        window: W, frames that temporal attention sees, the current one included.
        mlp_ratio: hidden width of the feed-forward part over D.
        modulation: how actions enter each block, or how many vectors they cost.
        positions: ``rotary`` (relative, any length) or ``learned`` (absolute, at most ``window`` frames a clip,
            as in the published weights).
        attention: the implementation that :func:`hma_gym.nn.attention.attend` uses.
    """

    layers: int = 6
    width: int = 256
    heads: int = 8
    window: int = 8
    mlp_ratio: float = 4.0
    modulation: ModulationKind = "adaln"
    positions: TimePositions = "rotary"
    attention: Implementation = "auto"

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.window) < 1 or self.width % (2 * self.heads):
            raise InvalidArgument(
                "trunk: layers, width, heads and window must be positive and width divisible by 2 * heads, got "
                f"layers={self.layers}, width={self.width}, heads={self.heads}, window={self.window}."
            )
        kinds = ("adaln", "residual", "published")
        if self.modulation not in kinds or self.positions not in ("rotary", "learned"):
            raise InvalidArgument(
                "trunk: modulation must be 'adaln', 'residual' or 'published' and positions 'rotary' or 'learned', got "
                f"modulation={self.modulation!r}, positions={self.positions!r}."
            )

    @property
    def modulation_vectors(self) -> int:
        """M: scale and shift for each of three inputs (adaln), or for one (residual, published)."""
        return 6 if self.modulation == "adaln" else 2


@dataclass(frozen=True)
class Cache:
    """Keys and values of the last W frames of B rollouts: a ring buffer with static shapes.

    Attributes:
        keys_BLWND, values_BLWND: slot w of a row holds the latest frame p < step with p % W == w.
        step_B: int64, frames committed so far, row by row (rows may be at different steps).
    """

    keys_BLWND: Tensor
    values_BLWND: Tensor
    step_B: Tensor


#: The large tensors of a cache, by name.
CACHED = ("keys_BLWND", "values_BLWND")


class Projection(nn.Module):
    """Queries, keys and values in one matrix, and the output projection, of one attention layer."""

    def __init__(self, config: TrunkConfig, bias: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=bias)
        self.out = nn.Linear(config.width, config.width)


class Block(nn.Module):
    """Spatial attention, temporal attention, feed-forward; each input normalised and modulated by the action."""

    #: Whether queries, keys and values of spatial attention have a bias, and temporal attention a normalised input.
    spatial_bias, temporal_norm = False, True
    #: Kind of GELU, and the epsilon of the normalisation inside a residual modulation.
    gelu, mix_epsilon = "tanh", 1e-5

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.width // config.heads
        self.scale = math.sqrt(BASE_HEAD_DIM) / self.head_dim
        hidden = int(config.width * config.mlp_ratio)
        self.spatial = Projection(config, self.spatial_bias)
        self.temporal = Projection(config)
        self.up = nn.Linear(config.width, hidden)
        self.down = nn.Linear(hidden, config.width)
        self.mix = nn.Linear(config.width, config.width) if config.modulation != "adaln" else None

    def _normalise(self, x_BTND: Tensor, modulation_BTMD: Tensor, part: int) -> Tensor:
        x_BTND = F.layer_norm(x_BTND, x_BTND.shape[-1:])
        if self.mix is not None:
            return x_BTND
        shift, scale = modulation_BTMD[:, :, 2 * part, None], modulation_BTMD[:, :, 2 * part + 1, None]
        return torch.addcmul(x_BTND + shift, x_BTND, scale)

    def _space(self, x_BTND: Tensor, modulation_BTMD: Tensor) -> Tensor:
        B, T, N, D = x_BTND.shape
        qkv = self.spatial.qkv(self._normalise(x_BTND, modulation_BTMD, 0))
        q, k, v = qkv.view(B * T, N, 3, self.config.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if x_BTND.is_cuda and self.spatial.qkv.weight.dtype == torch.bfloat16:  # rounded as all products are
            q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        y = attend(q, k, v, self.scale, how=self.config.attention).to(x_BTND.dtype)
        x_BTND = x_BTND + self.spatial.out(y.transpose(1, 2).reshape(B, T, N, D))
        if self.mix is not None:
            shift, scale = modulation_BTMD[:, :, 0, None], modulation_BTMD[:, :, 1, None]
            x_BTND = x_BTND + self.mix(F.layer_norm(x_BTND, (D,), eps=self.mix_epsilon) * (1 + scale) + shift)
        return x_BTND

    def _time_qkv(self, x_BTND: Tensor, modulation_BTMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of temporal attention, each (B, T, N, H, K), not yet rotated."""
        B, T, N, _ = x_BTND.shape
        qkv = self.temporal.qkv(self._normalise(x_BTND, modulation_BTMD, 1) if self.temporal_norm else x_BTND)
        q, k, v = qkv.view(B, T, N, 3, self.config.heads, self.head_dim).unbind(3)
        return q, k, v

    def _feed_forward(self, x_BTND: Tensor, modulation_BTMD: Tensor) -> Tensor:
        x = self._normalise(x_BTND, modulation_BTMD, 2)
        return x_BTND + gelu_between(self.up, x, self.down, self.gelu).to(x_BTND.dtype)

    def forward(
        self, x_BTND: Tensor, modulation_BTMD: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor
    ) -> Tensor:
        """A whole clip. ``rotary``: cosines and sines (T, K/2), None without; ``mask``: (T, T) bool."""
        x_BTND = self._space(x_BTND, modulation_BTMD)
        B, T, N, D = x_BTND.shape
        q, k, v = self._time_qkv(x_BTND, modulation_BTMD)
        if rotary is not None:
            cos, sin = (angle[:, None, None] for angle in rotary)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (y.permute(0, 2, 3, 1, 4) for y in (q, k, v))
        y = attend(q, k, v, self.scale, mask, how=self.config.attention)
        x_BTND = x_BTND + self.temporal.out(y.permute(0, 3, 1, 2, 4).reshape(B, T, N, D))
        return self._feed_forward(x_BTND, modulation_BTMD)

    def extend(
        self,
        x_BTND: Tensor,
        modulation_BTMD: Tensor,
        rotary_BT: tuple[Tensor, Tensor] | None,
        past_BWND: tuple[Tensor, Tensor],
        mask_BTS: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New frames only, against the ring buffer. Returns the output and the new keys and values, (B, T, N, D).

        ``rotary_BT``: cosines and sines (B, T, K/2), None without; ``mask_BTS``: (B, T, W + T) bool, True where a frame
        may look.
        """
        x_BTND = self._space(x_BTND, modulation_BTMD)
        B, T, N, D = x_BTND.shape
        q, k, v = (y.flatten(2, 3) for y in self._time_qkv(x_BTND, modulation_BTMD))
        if rotary_BT is not None:
            cos, sin = (angle[:, :, None] for angle in rotary_BT)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        keys, values = (y.view(B, -1, N * self.config.heads, self.head_dim) for y in past_BWND)
        y = attend_ring(q, (keys, values), (k, v), self.scale, mask_BTS)
        x_BTND = x_BTND + self.temporal.out(y.view(B, T, N, D))
        return self._feed_forward(x_BTND, modulation_BTMD), k.view(B, T, N, D), v.view(B, T, N, D)


class PublishedBlock(Block):
    """The block of the paper's published weights, which normalises no input of temporal attention.

    Scales and offsets of their layer norms become part of the matrices that follow (hence the bias), and so does the
    scale of their attention: see :mod:`hma_gym.dynamics.published`.
    """

    spatial_bias, temporal_norm = True, False
    gelu, mix_epsilon = "none", 1e-6


class SpaceTimeTransformer(nn.Module):
    """L blocks over (B, T, N, D)."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        kind = PublishedBlock if config.modulation == "published" else Block
        self.blocks = nn.ModuleList(kind(config) for _ in range(config.layers))
        self._extend_block = Block.extend
        self._where = SpaceTimeTransformer.where
        self.init_weights()

    def compile_extend(self, tuned: bool = False) -> None:
        """Let ``extend`` run its blocks through ``torch.compile``: one graph, which all blocks share. On a GPU also
        what says which frames see which, dozens of tiny operations.

        Args:
            tuned: try many kernels for each product first, those too that do what follows it (a minute, for a GPU).
        """
        mode = "max-autotune-no-cudagraphs" if tuned else None
        self._extend_block = compiled_apart(Block.extend, fullgraph=True, mode=mode)
        if next(self.parameters()).is_cuda:
            self._where = compiled_apart(SpaceTimeTransformer.where, fullgraph=True)

    def init_weights(self) -> None:
        """Variance 1/fan-in; matrices that write to the residual stream are smaller by sqrt(2 L)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.zeros_(parameter)
                continue
            depth = math.sqrt(2 * self.config.layers) if name.endswith(("out.weight", "down.weight")) else 1.0
            nn.init.normal_(parameter, std=1.0 / (math.sqrt(parameter.shape[1]) * depth))

    def _angles(self, position: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.config.positions == "learned":
            return None  # time enters by the input embedding
        return rotary_angles(position, self.config.width // self.config.heads)

    def forward(self, x_BTND: Tensor, modulation_BTLMD: Tensor) -> Tensor:
        """A clip of T frames from step 0. Returns (B, T, N, D)."""
        T = x_BTND.shape[1]
        rotary = self._angles(torch.arange(T, device=x_BTND.device))
        mask = window_mask(T, self.config.window, x_BTND.device)
        for layer, block in enumerate(self.blocks):
            x_BTND = block(x_BTND, modulation_BTLMD[:, :, layer], rotary, mask)
        return x_BTND

    def new_cache(self, batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Cache:
        """An empty cache for B rollouts of N tokens a frame; B * L * W * N * D * 2 numbers."""
        config = self.config
        shape = (batch, config.layers, config.window, tokens, config.width)
        return Cache(
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(batch, device=device, dtype=torch.int64),
        )

    def extend(
        self, x_BTND: Tensor, modulation_BTLMD: Tensor, cache: Cache, commit: int, in_place: bool = False
    ) -> tuple[Tensor, Cache]:
        """Run T new frames after the cached ones and commit the first ``commit`` of them to the cache.

        Args:
            in_place: write into the given cache's tensors (the caller gives that cache up) instead of a copy.

        Returns:
            (B, T, N, D), and the cache with ``step_B`` advanced by ``commit``.
        """
        B, T = x_BTND.shape[:2]
        rotary, mask_BTS, slots = self._where(self, cache.step_B, T, commit)
        keys, values = cache.keys_BLWND, cache.values_BLWND
        if commit and not in_place:
            keys, values = keys.clone(), values.clone()
        rows = torch.arange(B, device=x_BTND.device)[:, None]
        new = self._committed(commit)
        later: list[tuple[Tensor, Tensor]] = []
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            past = (cache.keys_BLWND[:, layer], cache.values_BLWND[:, layer])
            x_BTND, k, v = self._extend_block(block, x_BTND, modulation_BTLMD[:, :, layer], rotary, past, mask_BTS)
            if commit and (x_BTND.is_cuda or torch.compiler.is_compiling()):
                later.append((k[:, new], v[:, new]))
            elif commit:
                _commit_layer(keys, layer, k[:, new], rows, slots)
                _commit_layer(values, layer, v[:, new], rows, slots)
        if later and x_BTND.is_cuda:  # all layers at once: two launches for all of them
            commit_layers((keys, values), later, slots)
        elif later:
            _commit_in_place(keys, values, *map(list, zip(*later, strict=True)), slots)
        return x_BTND, Cache(keys, values, cache.step_B + commit)

    def _committed(self, commit: int) -> slice:
        """Which of the committed frames stay: more frames than slots leave the last ones."""
        return slice(max(commit - self.config.window, 0), commit)

    def where(self, step_B: Tensor, frames: int, commit: int) -> tuple[tuple[Tensor, Tensor] | None, Tensor, Tensor]:
        """Of so many new frames after ``step_B``: rotary angles, (B, T, K/2) each or None; which frames they see, bool
        (B, T, W + T); and the slots of those that are committed and stay, (B, C)."""
        window = self.config.window
        position_BT = step_B[:, None] + torch.arange(frames, device=step_B.device)
        past_BW = ring_positions(step_B, window)
        seen_BTW = (past_BW >= 0)[:, None] & (position_BT[:, :, None] - past_BW[:, None] < window)
        new_TT = window_mask(frames, window, step_B.device)
        mask_BTS = torch.cat((seen_BTW, new_TT.expand(len(step_B), frames, frames)), dim=2)
        return self._angles(position_BT), mask_BTS, torch.remainder(position_BT[:, self._committed(commit)], window)


def commit_layers(cache_BLWND: tuple[Tensor, Tensor], new_LBCND: list[tuple[Tensor, Tensor]], slots_BC: Tensor) -> None:
    """Write the new keys and values of all layers, a pair (B, C, N, D) for each, into their slots, in place."""
    rows_B1 = torch.arange(len(slots_BC), device=slots_BC.device)[:, None]
    for kept, new in zip(cache_BLWND, zip(*new_LBCND, strict=True), strict=True):
        kept.transpose(1, 2)[rows_B1, slots_BC] = torch.stack(new, dim=2).to(kept.dtype)


def _commit_layer(cache_BLWND: Tensor, layer: int, new_BCND: Tensor, rows_B1: Tensor, slots_BC: Tensor) -> None:
    """Write the new keys or values of one layer into their slots, in place."""
    cache_BLWND[rows_B1, layer, slots_BC] = new_BCND.to(cache_BLWND.dtype)


@torch.library.custom_op("hma_gym::commit_layers", mutates_args=("keys_BLWND", "values_BLWND"))
def _commit_in_place(
    keys_BLWND: Tensor, values_BLWND: Tensor, keys_LBCND: list[Tensor], values_LBCND: list[Tensor], slots_BC: Tensor
) -> None:
    """As :func:`commit_layers` inside code compiled for a CPU, which would copy the cache to change it, and back."""
    rows_B1 = torch.arange(len(slots_BC))[:, None]
    for cache, layers in ((keys_BLWND, keys_LBCND), (values_BLWND, values_LBCND)):
        for layer, new_BCND in enumerate(layers):
            _commit_layer(cache, layer, new_BCND, rows_B1, slots_BC)
