"""Rollouts of the published models by a few GPU kernels: nine a layer in place of some thirty operations.

The frames of one rollout are too little work for a GPU: it waits for kernels to begin and to end. The kernels here
(:mod:`hma_gym.nn.kernels`, written in Triton, which PyTorch for GPUs brings along) do what :class:`PublishedBlock` and
the discrete head do, to float rounding: products, and what they read, in the precision of the weights (float32, TF32
where PyTorch allows it, bfloat16) with sums in float32, everything else in float32. Together with CUDA graphs, which
spare the host the launches, that is for small batches; large ones gain less.

Sizes of tiles are chosen so that a product has not many fewer tiles than the GPU has processors: of those that were
timed on an H200 (132 processors) for products of 640 rows, tiles of 64 x 32, 64 x 64 and 64 x 128 were the fastest for
256, 768 and 1024 columns, which are 80, 120 and 80 of them. Smaller ones read the same rows and weights more often.

Shape legend: as :mod:`hma_gym.nn.transformer`; S tokens of a frame, V factors of their vocabulary, M positions of a
frame with those of its action.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hma_gym.errors import InvalidArgument
from hma_gym.nn.transformer import Cache, PublishedBlock, SpaceTimeTransformer

#: Tiles for each of a GPU's processors that are enough, see above.
_BUSY = 0.6

#: Processors of an H100 or H200, for which kernels are compiled where there is no GPU.
_PROCESSORS = 132

#: Bytes of shared memory that a tile may need; any GPU since 2020 has 1 KB more.
_SHARED = 98 * 1024

#: Heads of tokens that attend over time in one program, at most.
_GROUP = 16

#: Of a layer norm, where nothing else is said.
_EPSILON = 1e-5


def _power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not less."""
    return max(least, 1 << (number - 1).bit_length())


def _tiles(count: int, size: int) -> int:
    return -(-count // size)


@dataclass(frozen=True)
class Rows:
    """Rows of the residual stream, and what a product of them, or of their layer norm, needs.

    Attributes:
        x_BTND: float32.
        low_BTND: the same in the precision of products.
        moments_BTNP2: of each part of a row, the mean and the sum of squared deviations from it; or None.
        part: columns of each part but the last, which may have fewer.
    """

    x_BTND: Tensor
    low_BTND: Tensor
    moments_BTNP2: Tensor | None = None
    part: int = 1


@dataclass(frozen=True)
class _Norm:
    """What is done to a product's input.

    Attributes:
        epsilon: of a layer norm.
        modulation_BT2D: shift and scale after it, if any.
    """

    epsilon: float
    modulation_BT2D: Tensor | None = None


def check_device(device: torch.device, early: bool, interpreted: bool) -> None:
    """Raises :class:`InvalidArgument` for a device that does not run kernels; what is ``interpreted`` needs none."""
    if device.type != "cuda" and not interpreted:
        raise InvalidArgument(
            f"fused kernels need weights on a CUDA device, got {str(device)!r}; call the model's own step."
        )
    if early and (interpreted or torch.cuda.get_device_capability(device) < (9, 0)):
        raise InvalidArgument(
            f"early kernels need compute capability 9.0 or above, got device {str(device)!r}; leave early out."
        )


class Launcher:
    """Launches the kernels of :mod:`hma_gym.nn.kernels`.

    Args:
        device: of all tensors.
        early: begin each while the one before it ends; needs compute capability 9.0.

    Raises:
        MissingExtra: no Triton here.
        InvalidArgument: a device without what they need. (With ``TRITON_INTERPRET=1`` in the environment from the start
            they are interpreted on a CPU, slowly: that is for tests.)
    """

    def __init__(self, device: torch.device, early: bool = False) -> None:
        self._kernels = importlib.import_module("hma_gym.nn.kernels")  # which needs Triton
        check_device(device, early, self._kernels.INTERPRETED)
        self._options: dict[str, Any] = {"launch_pdl": True} if early else {}
        self._early = early
        there = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if there else _PROCESSORS
        self._enough = _BUSY * processors

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 3, **constants: Any
    ) -> None:
        constants |= {"EARLY": self._early, "num_warps": warps, "num_stages": stages, **self._options}
        self._start(kernel, grid, arguments, constants)

    def _start(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        kernel[grid](*arguments, **constants)

    def rows(self, x_BTND: Tensor, low: torch.dtype) -> Rows:
        """Rows (float32) for products in the precision ``low``."""
        D = x_BTND.shape[-1]
        rows = x_BTND.numel() // D
        lowered = x_BTND if low == x_BTND.dtype else torch.empty_like(x_BTND, dtype=low)
        moments = torch.empty(*x_BTND.shape[:-1], 1, 2, device=x_BTND.device)
        self._launch(
            self._kernels.moments,
            (_tiles(rows, 8),),
            x_BTND,
            lowered,
            moments,
            rows,
            WIDTH=D,
            LOW=lowered is not x_BTND,
            WIDTH_TILE=_power_of_two(D),
            ROW_TILE=8,
        )
        return Rows(x_BTND, lowered, moments, D)

    def linear(
        self,
        layer: nn.Linear,
        x: Tensor | Rows,
        norm: _Norm | None = None,
        *,
        gelu: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """A linear layer of B * T * N rows, what comes before and after it, in ``dtype``; moments for a ``norm``."""
        return self._linear(layer, x, norm, gelu=gelu, dtype=dtype).x_BTND

    def linear_onto(
        self, layer: nn.Linear, x: Tensor | Rows, onto: Rows, norm: _Norm | None = None, *, moments: bool = True
    ) -> Rows:
        """``onto`` and a linear layer of ``x``; ``onto`` is ``x``, or older than what was launched last."""
        return self._linear(layer, x, norm, onto=onto, moments=moments)

    def _linear(
        self,
        layer: nn.Linear,
        x: Tensor | Rows,
        norm: _Norm | None,
        *,
        gelu: bool = False,
        dtype: torch.dtype = torch.float32,
        onto: Rows | None = None,
        moments: bool = False,
    ) -> Rows:
        given = x if isinstance(x, Rows) else Rows(x, x)
        low, weight, out = given.low_BTND, layer.weight, len(layer.weight)
        modulation, told = norm.modulation_BT2D if norm else None, given.moments_BTNP2 if norm else None
        B, T, N, inner = low.shape
        if modulation is not None and modulation.stride()[2:] != (inner, 1):
            modulation = modulation.contiguous()
        sets, rows = (1, B * T * N) if modulation is None else (B * T, N)  # a modulated tile is of one frame
        sizes = low.itemsize, weight.itemsize
        tiles = _product_tiles(sets, rows, out, inner, sizes, modulation is not None, self._enough)
        parts = told.shape[-2] if told is not None else 1
        y = torch.empty(B, T, N, out, device=low.device, dtype=dtype)
        lowered = torch.empty_like(onto.low_BTND) if onto and onto.low_BTND is not onto.x_BTND else None
        made = torch.empty(B, T, N, _tiles(out, tiles.out), 2, device=low.device) if moments else None
        self._launch(
            self._kernels.linear,
            (sets * _tiles(rows, tiles.rows), _tiles(out, tiles.out)),
            low,
            weight,
            layer.bias if layer.bias is not None else weight,
            told if told is not None else weight,
            modulation if modulation is not None else weight,
            onto.x_BTND if onto is not None else weight,
            y,
            lowered if lowered is not None else y,
            made if made is not None else y,
            B * T * N,
            N,
            T,
            *((modulation.stride(0), modulation.stride(1)) if modulation is not None else (0, 0)),
            OUT=out,
            INNER=inner,
            NORMALISE=norm is not None,
            EPSILON=norm.epsilon if norm else 0.0,
            PARTS=parts,
            PART=given.part,
            MODULATE=modulation is not None,
            BIAS=layer.bias is not None,
            GELU=gelu,
            RESIDUAL=onto is not None,
            OLD_RESIDUAL=onto is not None and onto is not x,
            LOW=lowered is not None,
            MOMENTS=made is not None,
            PRECISION=_precision(),
            ROW_TILE=tiles.rows,
            OUT_TILE=tiles.out,
            INNER_TILE=tiles.inner,
            WHOLE_TILE=_power_of_two(inner, 16),
            warps=tiles.warps,
            stages=tiles.stages,
        )
        return Rows(y, y if lowered is None else lowered, made, tiles.out)

    def attend_frame(self, qkv_BTNE: Tensor, heads: int, scale: float) -> Tensor:
        """Attention within frames, (B, T, N, D) in the dtype of queries, keys and values, E = 3 D numbers a token."""
        B, T, N, E = qkv_BTNE.shape
        head_dim = E // 3 // heads
        y = torch.empty(B, T, N, E // 3, device=qkv_BTNE.device, dtype=qkv_BTNE.dtype)
        dims = _power_of_two(head_dim, 16)
        queries, keys, warps = _attention_tiles(B * T * heads, N, dims, qkv_BTNE.itemsize, self._enough)
        self._launch(
            self._kernels.attend_frame,
            (_tiles(N, queries), B * T * heads),
            qkv_BTNE,
            y,
            N,
            scale,
            HEADS=heads,
            HEAD_DIM=head_dim,
            DIM_TILE=dims,
            PRECISION=_precision(),
            QUERY_TILE=queries,
            KEY_TILE=keys,
            warps=warps,
            stages=3 if dims * qkv_BTNE.itemsize <= 256 else 2,
        )
        return y

    def attend_ring(
        self,
        qkv_BTNE: Tensor,
        past_BWND: tuple[Tensor, Tensor],
        into_BWND: tuple[Tensor, Tensor],
        step_B: Tensor,
        commit: int,
        heads: int,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Attention over time to the ring buffer and among the new frames, (B, T, N, D) in ``dtype``; the keys and
        values of the first ``commit`` frames go into the slots of ``into_BWND``, which may be the past itself."""
        B, T, N, E = qkv_BTNE.shape
        W, head_dim = past_BWND[0].shape[1], E // 3 // heads
        y = torch.empty(B, T, N, E // 3, device=qkv_BTNE.device, dtype=dtype)
        dims = _power_of_two(head_dim, 16)
        group = max(1, min(_GROUP, 8192 // (dims * max(_power_of_two(W), _power_of_two(T)))))
        self._launch(
            self._kernels.attend_ring,
            (_tiles(N * heads, group), B),
            qkv_BTNE,
            *past_BWND,
            *into_BWND,
            step_B,
            y,
            N,
            T,
            commit,
            past_BWND[0].stride(0),
            scale,
            HEADS=heads,
            HEAD_DIM=head_dim,
            WINDOW=W,
            DIM_TILE=dims,
            WINDOW_TILE=_power_of_two(W),
            FRAME_TILE=_power_of_two(T),
            GROUP_TILE=group,
            COMMIT=commit > 0,
        )
        return y

    def embed(
        self,
        tokens_BTN: Tensor,
        masked_BTN: Tensor,
        tables_VFD: Tensor,
        mask_D: Tensor,
        action_BTD: Tensor,
        position_WMD: Tensor,
        step_B: Tensor,
    ) -> Tensor:
        """Columns (B, T, M, D) of frames whose first is at the time position ``step_B``, in float32.

        Args:
            tokens_BTN, masked_BTN: int64 tokens, and bool, True where hidden.
            tables_VFD: embeddings of the F values of each factor.
            mask_D: in place of hidden tokens.
            action_BTD: of the actions, at all positions after the tokens.
            position_WMD: of positions in time and frame.
        """
        B, T, N = tokens_BTN.shape
        M, D = position_WMD.shape[1:]
        x = torch.empty(B, T, M, D, device=tokens_BTN.device)
        self._launch(
            self._kernels.embed,
            (_tiles(M, 8), B * T),
            tokens_BTN.contiguous(),
            masked_BTN.contiguous(),
            tables_VFD,
            mask_D,
            action_BTD,
            position_WMD,
            step_B,
            x,
            N,
            M,
            T,
            action_BTD.stride(0),
            action_BTD.stride(1),
            FACTORS=len(tables_VFD),
            SIZE=tables_VFD.shape[1],
            WIDTH=D,
            WIDTH_TILE=_power_of_two(D),
            ROW_TILE=8,
        )
        return x

    def unmask(
        self,
        logits_BNVF: Tensor,
        tokens_BN: Tensor,
        masked_BN: Tensor,
        seed_B: Tensor,
        step_B: Tensor,
        stream: int,
        left: int,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) with the likeliest ones where they were hidden, and what stays hidden, ``left`` in each row.

        The order is random, that of :func:`hma_gym.nn.noise.uniform` for ``stream``.
        """
        B, N, V, F = logits_BNVF.shape
        tokens, masked = torch.empty_like(tokens_BN), torch.empty_like(masked_BN)
        self._launch(
            self._kernels.unmask,
            (_tiles(N, 4), B),
            logits_BNVF,
            tokens_BN.contiguous(),
            masked_BN.contiguous(),
            seed_B,
            step_B,
            tokens,
            masked,
            N,
            left,
            STREAM=stream,
            FACTORS=V,
            SIZE=F,
            SIZE_TILE=_power_of_two(F),
            POSITIONS_TILE=_power_of_two(N),
            ROW_TILE=4,
        )
        return tokens, masked


def _precision() -> str:
    """Of products of float32 numbers, as PyTorch is told for its own."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@dataclass(frozen=True)
class _Tiles:
    """Rows, columns and depth of a product's tiles; warps for each, and how many depths are on their way at once."""

    rows: int
    out: int
    inner: int
    warps: int
    stages: int = 1


def _product_tiles(
    sets: int, rows: int, out: int, inner: int, sizes: tuple[int, int], modulated: bool, enough: float
) -> _Tiles:
    """Tiles of a product of so many sets of rows: the largest of which there are enough.

    Args:
        sizes: bytes of a number of the input, and of a weight.
        modulated: the weights are changed first, in registers.
    """
    if sizes[1] == 2:
        largest = 2 if modulated else 0
    else:
        largest = 1 if _precision() == "tf32" else 2  # three products need more registers
    candidates = ((64, 128), (64, 64), (64, 32), (32, 32), (16, 32))[largest:]
    fit = ((r, o) for r, o in candidates if sets * _tiles(rows, r) * _tiles(out, o) >= enough)
    row_tile, out_tile = next(fit, candidates[-1])
    warps = 8 if out_tile > 64 or modulated or (sizes[1] > 2 and row_tile >= 64) else 4
    deepest, bytes_deep = _power_of_two(inner, 16), row_tile * sizes[0] + out_tile * sizes[1]
    if sizes[1] == 2 and inner <= 256 and deepest * bytes_deep <= _SHARED:
        return _Tiles(row_tile, out_tile, deepest, warps)
    depth = min(deepest, 128 if sizes[1] == 2 else 32)
    while depth > 16 and 3 * depth * bytes_deep > _SHARED:
        depth //= 2
    return _Tiles(row_tile, out_tile, depth, warps, min(5 if sizes[1] == 2 else 3, _SHARED // (depth * bytes_deep)))


def _attention_tiles(sets: int, tokens: int, dims: int, itemsize: int, enough: float) -> tuple[int, int, int]:
    """Queries, keys and warps of a tile of attention within frames: as many queries as registers hold, if there are
    enough such tiles; a warp has its rows for itself where they are narrow."""
    sizes = (64, 32) if dims <= 64 else (32,)
    queries = next((size for size in sizes if sets * _tiles(tokens, size) >= enough), 16)
    return queries, 64 if dims * itemsize <= 64 else 32, queries // 16 if dims * itemsize <= 256 else 4


def extend(
    launcher: Launcher,
    trunk: SpaceTimeTransformer,
    x_BTND: Tensor,
    modulation_BTLMD: Tensor,
    cache: Cache,
    commit: int,
    in_place: bool = False,
) -> tuple[Tensor, Cache]:
    """As :meth:`SpaceTimeTransformer.extend` of a trunk of published blocks."""
    keys, values = cache.keys_BLWND, cache.values_BLWND
    if commit and not in_place:
        keys, values = keys.clone(), values.clone()
    assert isinstance(trunk.blocks[0], PublishedBlock)
    rows = launcher.rows(x_BTND, trunk.blocks[0].up.weight.dtype)
    for layer, block in enumerate(trunk.blocks):
        assert isinstance(block, PublishedBlock)
        past = cache.keys_BLWND[:, layer], cache.values_BLWND[:, layer]
        into = keys[:, layer], values[:, layer]
        rows = _block(launcher, block, rows, modulation_BTLMD[:, :, layer], past, into, cache.step_B, commit)
    return rows.x_BTND, Cache(keys, values, cache.step_B + commit)


def _block(
    launcher: Launcher,
    block: PublishedBlock,
    rows: Rows,
    modulation_BT2D: Tensor,
    past_BWND: tuple[Tensor, Tensor],
    into_BWND: tuple[Tensor, Tensor],
    step_B: Tensor,
    commit: int,
) -> Rows:
    low, heads = block.up.weight.dtype, block.config.heads  # what only products read is kept as they take it
    normal = _Norm(_EPSILON)
    qkv = launcher.linear(block.spatial.qkv, rows, normal, dtype=low)
    y = launcher.attend_frame(qkv, heads, block.scale)
    rows = launcher.linear_onto(block.spatial.out, y, rows)
    assert block.mix is not None
    modulated = _Norm(block.mix_epsilon, modulation_BT2D)
    rows = launcher.linear_onto(block.mix, rows, rows, modulated, moments=False)
    qkv = launcher.linear(block.temporal.qkv, rows)
    y = launcher.attend_ring(qkv, past_BWND, into_BWND, step_B, commit, heads, block.scale, low)
    rows = launcher.linear_onto(block.temporal.out, y, rows)
    hidden = launcher.linear(block.up, rows, normal, gelu=True, dtype=low)
    return launcher.linear_onto(block.down, hidden, rows)
