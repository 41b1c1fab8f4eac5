"""Rollouts of the published models by a few GPU kernels: eight a layer in place of some thirty operations.

The frames of one rollout are too little work for a GPU: it waits for kernels to begin and to end. The kernels here
(:mod:`hma_gym.nn.kernels`, written in Triton, which PyTorch for GPUs brings along) do what :class:`PublishedBlock` and
the discrete head do, to float rounding: products, and what they read, in the precision of the weights (float32, TF32
where PyTorch allows it, bfloat16) with sums in float32, everything else in float32. Together with CUDA graphs, which
spare the host the launches, that is for small batches; large ones gain less.

Shape legend: as :mod:`hma_gym.nn.transformer`; S tokens of a frame, V factors of their vocabulary, M positions of a
frame with those of its action.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hma_gym.errors import InvalidArgument
from hma_gym.nn.tiles import Product, attention_tiles, power_of_two, product_tiles, ring_group, tiles_of
from hma_gym.nn.transformer import Cache, PublishedBlock

#: Processors of an H100 or H200, for which kernels are compiled where there is no GPU.
_PROCESSORS = 132

#: Of a layer norm, where nothing else is said.
_EPSILON = 1e-5


@dataclass(frozen=True)
class Rows:
    """Rows of the residual stream, and what a product of them, or of their layer norm, needs.

    Attributes:
        x_BTND: float32.
        low_BTND: the same in the precision of products.
        moments_BTN2P: the means of all parts of a row, then the sums of squared deviations from these; or None.
        part: columns of each part but the last, which may have fewer.
    """

    x_BTND: Tensor
    low_BTND: Tensor
    moments_BTN2P: Tensor | None = None
    part: int = 1


@dataclass(frozen=True)
class Affine:
    """A linear layer, of all rows, or one for each frame of each row (then there are dims B and T before).

    Attributes:
        weight_EK: in the precision of products.
        bias_E: what is added, if anything.
        columns_E: the sum of each output's weights, float32, for a norm of the input.
    """

    weight_EK: Tensor
    bias_E: Tensor | None
    columns_E: Tensor

    @staticmethod
    def of(layer: nn.Linear) -> Affine:
        """With the weights of a layer, where they are now."""
        weight_EK, bias_E = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        return Affine(weight_EK, bias_E, weight_EK.double().sum(1).float())


@dataclass(frozen=True)
class Modulated:
    """Layers that read a modulated norm, all of a trunk's at once.

    Attributes:
        weight_LEK, bias_LE: of what is modulated.
    """

    weight_LEK: Tensor
    bias_LE: Tensor

    def own(self, told_BTX: Tensor, first: int, last: int) -> Affine:
        """Outputs ``first`` to ``last`` as a layer of the norm itself, of what :meth:`Launcher.modulate` told."""
        E, K = self.weight_LEK.shape[1:]
        weights, vectors = _told_sizes(self.weight_LEK)
        weight_BTEK = told_BTX[..., :weights].view(self.weight_LEK.dtype).unflatten(-1, (E, K))[:, :, first:last]
        bias_BTE, columns_BTE = told_BTX[..., weights : weights + vectors].unflatten(-1, (2, E)).unbind(-2)
        return Affine(weight_BTEK, bias_BTE[..., first:last], columns_BTE[..., first:last])


def _told_sizes(weight_LEK: Tensor) -> tuple[int, int]:
    """How many float32 numbers the weights and the vectors of a layer are."""
    E, K = weight_LEK.shape[1:]
    return E * K * weight_LEK.itemsize // 4, 2 * E


@dataclass(frozen=True)
class BlockWeights:
    """A published block for kernels, but for what is modulated.

    Attributes:
        space_qkv, space_out: of attention within frames.
        time_qkv_EK, time_out_EK: weights of attention over time, which are added to others.
        up, down: of the MLP.
        heads, scale: of both attentions.
        mix_epsilon: of the norm that is modulated.
    """

    space_qkv: Affine
    space_out: Affine
    time_qkv_EK: Tensor
    time_out_EK: Tensor
    up: Affine
    down: Affine
    heads: int
    scale: float
    mix_epsilon: float

    @staticmethod
    def of(block: PublishedBlock) -> BlockWeights:
        """With a block's weights, where they are now."""
        return BlockWeights(
            Affine.of(block.spatial.qkv),
            Affine.of(block.spatial.out),
            block.temporal.qkv.weight.detach(),
            block.temporal.out.weight.detach(),
            Affine.of(block.up),
            Affine.of(block.down),
            block.config.heads,
            block.scale,
            block.mix_epsilon,
        )


@torch.no_grad()
def modulated(blocks: Sequence[PublishedBlock]) -> Modulated:
    """What published blocks mix into their stream before temporal attention, as part of what reads and what follows it.

    With the modulated norm m of the stream x, temporal attention reads x' = x + mix(m), so qkv(x') = qkv(x) +
    (qkv mix)(m). And behind it, with what it gives, y, the stream is x' + out(y) = x + mix(m) + out(y). So there are
    3 D outputs of qkv mix, and D of mix, each with the bias of its sum, and no layer between the two.
    """
    weights, biases = [], []
    for block in blocks:
        mix, qkv, out = block.mix, block.temporal.qkv, block.temporal.out
        assert mix is not None
        through, bias = qkv.weight.double(), mix.bias.double()
        weights += [(through @ mix.weight.double()).to(qkv.weight.dtype), mix.weight]
        biases += [through @ bias + (0.0 if qkv.bias is None else qkv.bias.double()), bias + out.bias.double()]
    L = len(blocks)
    return Modulated(torch.cat(weights).unflatten(0, (L, -1)), torch.cat(biases).float().unflatten(0, (L, -1)))


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
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count if there else _PROCESSORS

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
        moments = torch.empty(*x_BTND.shape[:-1], 2, 1, device=x_BTND.device)
        self._launch(
            self._kernels.moments,
            (tiles_of(rows, 8),),
            x_BTND,
            lowered,
            moments,
            rows,
            WIDTH=D,
            LOW=lowered is not x_BTND,
            WIDTH_TILE=power_of_two(D),
            ROW_TILE=8,
        )
        return Rows(x_BTND, lowered, moments, D)

    def modulate(self, layers: Modulated, modulation_BTL2D: Tensor) -> Tensor:
        """Modulated layers as layers of what is not modulated, (B, T, L, 1, X) float32: weights (in their own
        precision) and vectors, as :meth:`Modulated.own` knows them."""
        B, T = modulation_BTL2D.shape[:2]
        L, E, K = layers.weight_LEK.shape
        modulation_BTL2D, size = modulation_BTL2D.contiguous(), max(1, 2048 // power_of_two(K, 16))
        weights, vectors = _told_sizes(layers.weight_LEK)
        told = torch.empty(B, T, L, 1, weights + vectors, device=modulation_BTL2D.device)
        own, apart = told[..., :weights].view(layers.weight_LEK.dtype), told[..., weights:]
        self._launch(
            self._kernels.modulate,
            (tiles_of(E, size), L, B * T),
            layers.weight_LEK,
            layers.bias_LE,
            modulation_BTL2D,
            own,
            apart,
            T,
            modulation_BTL2D.stride(0),
            modulation_BTL2D.stride(1),
            own.stride(1),
            own.stride(2),
            apart.stride(1),
            apart.stride(2),
            OUT=E,
            INNER=K,
            INNER_TILE=power_of_two(K, 16),
            OUT_TILE=size,
        )
        return told

    def linear(
        self,
        layer: Affine,
        x: Tensor | Rows,
        epsilon: float | None = None,
        other: tuple[Tensor | Rows, Tensor] | None = None,
        *,
        gelu: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """A linear layer of B * T * N rows, what comes before and after it, in ``dtype``.

        Args:
            epsilon: of a layer norm of ``x`` (with moments); None for no norm.
            other: more rows and the weights of their product, which is added. They are ``x``, as it is without its
                norm, or what was launched last, and then ``x`` is older.
        """
        return self._linear(layer, x, epsilon, other, gelu=gelu, dtype=dtype).x_BTND

    def linear_onto(
        self,
        layer: Affine,
        x: Tensor | Rows,
        onto: Rows,
        epsilon: float | None = None,
        other: tuple[Tensor | Rows, Tensor] | None = None,
    ) -> Rows:
        """``onto`` and a linear layer of ``x``; ``onto`` is ``x``, or older than what was launched last."""
        return self._linear(layer, x, epsilon, other, onto=onto)

    def _linear(
        self,
        layer: Affine,
        x: Tensor | Rows,
        epsilon: float | None,
        other: tuple[Tensor | Rows, Tensor] | None,
        *,
        gelu: bool = False,
        dtype: torch.dtype = torch.float32,
        onto: Rows | None = None,
    ) -> Rows:
        given = x if isinstance(x, Rows) else Rows(x, x)
        low, weight, out = given.low_BTND, layer.weight_EK, layer.weight_EK.shape[-2]
        then, other_low, other_weight = False, low, weight
        if other is not None:
            more, other_weight = other
            then, other_low = more is not x, more.low_BTND if isinstance(more, Rows) else more
        told = given.moments_BTN2P if epsilon is not None else None
        own = weight.ndim == 4
        B, T, N, inner = low.shape
        sets, rows = (B * T, N) if own else (1, B * T * N)  # a tile with weights of its own is of one frame
        sizes, precision = (low.itemsize, weight.itemsize), _precision() if weight.itemsize == 4 else ""
        product = Product(sets, rows, out, inner, *sizes, precision, 1 + then, 2 if other else 1)
        tiles = product_tiles(product, self._processors)
        parts = told.shape[-1] if told is not None else 1
        y = torch.empty(B, T, N, out, device=low.device, dtype=dtype)
        lowered = torch.empty_like(onto.low_BTND) if onto and onto.low_BTND is not onto.x_BTND else None
        made = torch.empty(B, T, N, 2, tiles_of(out, tiles.out), device=low.device) if onto else None
        self._launch(
            self._kernels.linear,
            (sets * tiles_of(rows, tiles.rows), tiles_of(out, tiles.out)),
            low,
            weight,
            layer.bias_E if layer.bias_E is not None else weight,
            layer.columns_E,
            told if told is not None else weight,
            other_low,
            other_weight,
            onto.x_BTND if onto is not None else weight,
            y,
            lowered if lowered is not None else y,
            made if made is not None else y,
            B * T * N,
            N,
            T,
            *(weight.stride()[:2] if own else (0, 0)),
            *(layer.columns_E.stride()[:2] if own else (0, 0)),
            OUT=out,
            INNER=inner,
            NORMALISE=epsilon is not None,
            EPSILON=epsilon or 0.0,
            PARTS=parts,
            PART=given.part,
            OWN=own,
            AGAIN=other is not None and not then,
            THEN=then,
            BIAS=layer.bias_E is not None,
            GELU=gelu,
            RESIDUAL=onto is not None,
            OLD_RESIDUAL=onto is not None and (then or onto is not x),
            LOW=lowered is not None,
            MOMENTS=made is not None,
            PRECISION=_precision(),
            ROW_TILE=tiles.rows,
            OUT_TILE=tiles.out,
            INNER_TILE=tiles.inner,
            WHOLE_TILE=power_of_two(inner, 16),
            PARTS_TILE=power_of_two(parts),
            warps=tiles.warps,
            stages=tiles.stages,
        )
        return Rows(y, y if lowered is None else lowered, made, tiles.out)

    def attend_frame(self, qkv_BTNE: Tensor, heads: int, scale: float) -> Tensor:
        """Attention within frames, (B, T, N, D) in the dtype of queries, keys and values, E = 3 D numbers a token."""
        B, T, N, E = qkv_BTNE.shape
        head_dim = E // 3 // heads
        y = torch.empty(B, T, N, E // 3, device=qkv_BTNE.device, dtype=qkv_BTNE.dtype)
        dims = power_of_two(head_dim, 16)
        tiles = attention_tiles(B * T * heads, N, dims, qkv_BTNE.itemsize, self._processors)
        self._launch(
            self._kernels.attend_frame,
            (tiles_of(N, tiles.queries), B * T * heads),
            qkv_BTNE,
            y,
            N,
            scale,
            HEADS=heads,
            HEAD_DIM=head_dim,
            DIM_TILE=dims,
            PRECISION=_precision(),
            QUERY_TILE=tiles.queries,
            KEY_TILE=tiles.keys,
            warps=tiles.warps,
            stages=tiles.stages,
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
        group = ring_group(head_dim, W, T)
        self._launch(
            self._kernels.attend_ring,
            (tiles_of(N * heads, group), B),
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
            DIM_TILE=power_of_two(head_dim, 16),
            WINDOW_TILE=power_of_two(W),
            FRAME_TILE=power_of_two(T),
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
            (tiles_of(M, 8), B * T),
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
            WIDTH_TILE=power_of_two(D),
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
            (tiles_of(N, 4), B),
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
            SIZE_TILE=power_of_two(F),
            POSITIONS_TILE=power_of_two(N),
            ROW_TILE=4,
        )
        return tokens, masked


def _precision() -> str:
    """Of products of float32 numbers, as PyTorch is told for its own."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def extend(
    launcher: Launcher,
    blocks: Sequence[BlockWeights],
    layers: Modulated,
    x_BTND: Tensor,
    told_BTL1X: Tensor,
    cache: Cache,
    commit: int,
    in_place: bool = False,
) -> tuple[Tensor, Cache]:
    """As :meth:`SpaceTimeTransformer.extend` of a trunk of published blocks, whose ``layers`` were modulated."""
    keys, values = cache.keys_BLWND, cache.values_BLWND
    if commit and not in_place:
        keys, values = keys.clone(), values.clone()
    rows, width = launcher.rows(x_BTND, blocks[0].up.weight_EK.dtype), x_BTND.shape[-1]
    for layer, block in enumerate(blocks):
        past = cache.keys_BLWND[:, layer], cache.values_BLWND[:, layer]
        into = keys[:, layer], values[:, layer]
        told = told_BTL1X[:, :, layer, 0]
        own = layers.own(told, 0, 3 * width), layers.own(told, 3 * width, 4 * width)
        rows = _block(launcher, block, own, rows, past, into, cache.step_B, commit)
    return rows.x_BTND, Cache(keys, values, cache.step_B + commit)


def _block(
    launcher: Launcher,
    block: BlockWeights,
    own: tuple[Affine, Affine],
    rows: Rows,
    past_BWND: tuple[Tensor, Tensor],
    into_BWND: tuple[Tensor, Tensor],
    step_B: Tensor,
    commit: int,
) -> Rows:
    low, heads = block.up.weight_EK.dtype, block.heads  # what only products read is kept as they take it
    mixed_qkv, mix = own
    qkv = launcher.linear(block.space_qkv, rows, _EPSILON, dtype=low)
    y = launcher.attend_frame(qkv, heads, block.scale)
    rows = launcher.linear_onto(block.space_out, y, rows)
    qkv = launcher.linear(mixed_qkv, rows, block.mix_epsilon, (rows, block.time_qkv_EK))
    y = launcher.attend_ring(qkv, past_BWND, into_BWND, step_B, commit, heads, block.scale, low)
    rows = launcher.linear_onto(mix, rows, rows, block.mix_epsilon, (y, block.time_out_EK))
    hidden = launcher.linear(block.up, rows, _EPSILON, gelu=True, dtype=low)
    return launcher.linear_onto(block.down, hidden, rows)
