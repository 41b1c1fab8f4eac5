"""Rollouts of the published models by a few GPU kernels: nine a layer in place of some thirty operations.

The frames of one rollout are too little work for a GPU: it waits for kernels to begin and to end. The kernels here
(:mod:`hma_gym.nn.kernels`, written in Triton, which PyTorch for GPUs brings along) do what :class:`PublishedBlock` and
the discrete head do, in the same order and to float rounding: products in the precision of the weights (float32, TF32
where PyTorch allows it, bfloat16) with sums in float32, everything else in float32. Together with CUDA graphs, which
spare the host the launches, that is for small batches; large ones gain less.

Sizes of tiles are chosen so that a product has about as many tiles as the GPU has processors.

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

#: Tiles of a product that keep a GPU's processors busy: two each; an H100 has 132.
_BUSY = 264

#: Of a layer norm, where nothing else is said.
_EPSILON = 1e-5


def _power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not less."""
    return max(least, 1 << (number - 1).bit_length())


def _tiles(count: int, size: int) -> int:
    return -(-count // size)


@dataclass(frozen=True)
class _Input:
    """What is done to a product's input.

    Attributes:
        epsilon: of a layer norm; None without.
        modulation_BT2D: shift and scale after it.
    """

    epsilon: float | None = None
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

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, **constants: Any) -> None:
        kernel[grid](*arguments, **constants, EARLY=self._early, num_warps=warps, **self._options)

    def linear(
        self,
        layer: nn.Linear,
        x_BTND: Tensor,
        given: _Input | None = None,
        *,
        gelu: bool = False,
        residual: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """A linear layer of B * T * N rows, what comes before and after it, in ``dtype``."""
        given = given or _Input()
        B, T, N, inner = x_BTND.shape
        weight, rows, out = layer.weight, B * T * N, len(layer.weight)
        y = torch.empty(B, T, N, out, device=x_BTND.device, dtype=dtype)
        modulation = given.modulation_BT2D
        if modulation is not None and modulation.stride()[2:] != (inner, 1):
            modulation = modulation.contiguous()
        row_tile, out_tile, inner_tile, warps = _product_tiles(
            rows, out, inner, weight.itemsize, modulation is not None
        )
        self._launch(
            self._kernels.linear,
            (_tiles(rows, row_tile), _tiles(out, out_tile)),
            x_BTND,
            weight,
            layer.bias if layer.bias is not None else weight,
            modulation if modulation is not None else weight,
            residual if residual is not None else weight,
            y,
            rows,
            N,
            T,
            *((modulation.stride(0), modulation.stride(1)) if modulation is not None else (0, 0)),
            OUT=out,
            INNER=inner,
            NORMALISE=given.epsilon is not None,
            EPSILON=given.epsilon or 0.0,
            MODULATE=modulation is not None,
            BIAS=layer.bias is not None,
            GELU=gelu,
            RESIDUAL=residual is not None,
            PRECISION=_precision(),
            ROW_TILE=row_tile,
            OUT_TILE=out_tile,
            INNER_TILE=inner_tile,
            warps=warps,
        )
        return y

    def attend_frame(self, qkv_BTNE: Tensor, heads: int, scale: float) -> Tensor:
        """Attention within frames, (B, T, N, D) in the dtype of queries, keys and values, E = 3 D numbers a token."""
        B, T, N, E = qkv_BTNE.shape
        head_dim = E // 3 // heads
        y = torch.empty(B, T, N, E // 3, device=qkv_BTNE.device, dtype=qkv_BTNE.dtype)
        dims = _power_of_two(head_dim, 16)
        sizes = (64, 32) if dims <= 64 else (32,)  # as many as registers hold
        queries = next((size for size in sizes if _tiles(N, size) * B * T * heads >= _BUSY), 16)
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
            KEY_TILE=64 if dims <= 64 else 32,
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
        group = max(1, min(16, 8192 // (dims * max(_power_of_two(W), _power_of_two(T)))))
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


def _product_tiles(rows: int, out: int, inner: int, itemsize: int, modulated: bool) -> tuple[int, int, int, int]:
    """Rows, columns and depth of a product's tiles, and warps for each: the largest ones of which there are enough, and
    as deep as registers and 99 KB of shared memory hold, which any GPU since 2020 has; in one step if they can."""
    sizes = ((128, 128, 8), (64, 64, 4), (32, 64, 4), (32, 32, 4))[1 if modulated or itemsize > 2 else 0 :]
    enough = [size for size in sizes if _tiles(rows, size[0]) * _tiles(out, size[1]) >= _BUSY]
    row_tile, out_tile, warps = enough[0] if enough else (16, 32, 4)
    if itemsize == 2 and row_tile <= 32 and inner <= 256:
        return row_tile, out_tile, _power_of_two(inner, 16), warps
    depth = 256 // itemsize // (1 if row_tile <= 32 else 2) // (2 if modulated else 1)
    return row_tile, out_tile, min(_power_of_two(inner, 16), depth), warps


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
    for layer, block in enumerate(trunk.blocks):
        assert isinstance(block, PublishedBlock)
        past = cache.keys_BLWND[:, layer], cache.values_BLWND[:, layer]
        into = keys[:, layer], values[:, layer]
        x_BTND = _block(launcher, block, x_BTND, modulation_BTLMD[:, :, layer], past, into, cache.step_B, commit)
    return x_BTND, Cache(keys, values, cache.step_B + commit)


def _block(
    launcher: Launcher,
    block: PublishedBlock,
    x_BTND: Tensor,
    modulation_BT2D: Tensor,
    past_BWND: tuple[Tensor, Tensor],
    into_BWND: tuple[Tensor, Tensor],
    step_B: Tensor,
    commit: int,
) -> Tensor:
    low, heads = block.up.weight.dtype, block.config.heads  # what only products read is kept as they take it
    normal = _Input(_EPSILON)
    qkv = launcher.linear(block.spatial.qkv, x_BTND, normal, dtype=low)
    y = launcher.attend_frame(qkv, heads, block.scale)
    x_BTND = launcher.linear(block.spatial.out, y, residual=x_BTND)
    assert block.mix is not None
    modulated = _Input(block.mix_epsilon, modulation_BT2D)
    x_BTND = launcher.linear(block.mix, x_BTND, modulated, residual=x_BTND)
    qkv = launcher.linear(block.temporal.qkv, x_BTND)
    y = launcher.attend_ring(qkv, past_BWND, into_BWND, step_B, commit, heads, block.scale, low)
    x_BTND = launcher.linear(block.temporal.out, y, residual=x_BTND)
    hidden = launcher.linear(block.up, x_BTND, normal, gelu=True, dtype=low)
    return launcher.linear(block.down, hidden, residual=x_BTND)
