"""Sizes of tiles for the kernels of :mod:`hma_gym.nn.fused`.

The largest tiles of which there are not many fewer than the GPU has processors: smaller ones read the same rows and
weights more often. On an H200, for a frame of the published Base in bfloat16, no other tiles that were tried for one
kernel after the other made the frame faster by more than a hundredth.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Tiles for each of a GPU's processors that are enough.
_BUSY = 0.6

#: Bytes of shared memory that a tile may need; any GPU since 2020 has 1 KB more.
_SHARED = 98 * 1024

#: Heads of tokens that attend over time in one program, at most.
_GROUP = 16


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not less."""
    return max(least, 1 << (number - 1).bit_length())


def tiles_of(count: int, size: int) -> int:
    """How many tiles of a size there are."""
    return -(-count // size)


@dataclass(frozen=True)
class Product:
    """A product, or a sum of products, of sets of rows.

    Attributes:
        sets, rows: how many sets, and rows of each; a tile is of one set.
        out, inner: columns, and depth.
        x_bytes, weight_bytes: of a number of the input, and of a weight.
        precision: how float32 numbers are multiplied, ``tf32`` or ``tf32x3``; "" for shorter ones.
        inputs, weights: how many there are in a sum.
    """

    sets: int
    rows: int
    out: int
    inner: int
    x_bytes: int
    weight_bytes: int
    precision: str
    inputs: int = 1
    weights: int = 1


@dataclass(frozen=True)
class ProductTiles:
    """Rows, columns and depth of a product's tiles; warps for each, and how many depths are on their way at once."""

    rows: int
    out: int
    inner: int
    warps: int
    stages: int = 1


def product_tiles(product: Product, processors: int) -> ProductTiles:
    """Tiles of a product on a GPU with so many processors."""
    halves = product.weight_bytes == 2
    if halves:
        largest = 1 if product.weights > 1 else 0
    else:
        largest = 1 if product.precision == "tf32" else 2  # three products need more registers
    candidates = ((64, 128), (64, 64), (64, 32), (32, 32), (16, 32))[largest:]
    found = ((product.sets * tiles_of(product.rows, r) * tiles_of(product.out, o), (r, o)) for r, o in candidates)
    rows, out = next((size for count, size in found if count >= _BUSY * processors), candidates[-1])
    warps = 8 if out > 64 or (not halves and rows >= 64) else 4
    deepest = power_of_two(product.inner, 16)
    x_bytes, weight_bytes = rows * product.x_bytes, out * product.weight_bytes
    if halves and product.inner <= 256:
        if deepest * (x_bytes * product.inputs + weight_bytes * product.weights) <= _SHARED:
            return ProductTiles(rows, out, deepest, warps)
    depth, bytes_deep = min(deepest, 128 if halves else 32), x_bytes + weight_bytes
    while depth > 16 and 3 * depth * bytes_deep > _SHARED:
        depth //= 2
    return ProductTiles(rows, out, depth, warps, min(5 if halves else 3, _SHARED // (depth * bytes_deep)))


@dataclass(frozen=True)
class AttentionTiles:
    """Queries and keys of a tile, warps for it, and how many tiles of keys are on their way at once."""

    queries: int
    keys: int
    warps: int
    stages: int


def attention_tiles(sets: int, tokens: int, dims: int, itemsize: int, processors: int) -> AttentionTiles:
    """As many queries as registers hold, if there are enough such tiles; a warp has its rows for itself where they are
    narrow.

    Args:
        sets: heads of all frames, of so many tokens each.
        dims, itemsize: numbers of a head, and their bytes.
        processors: of the GPU.
    """
    head_bytes = dims * itemsize
    sizes = (64, 32) if dims <= 64 else (32,)
    queries = next((size for size in sizes if sets * tiles_of(tokens, size) >= _BUSY * processors), 16)
    warps = queries // 16 if head_bytes <= 256 else 4
    return AttentionTiles(queries, 64 if head_bytes <= 64 else 32, warps, 3 if head_bytes <= 256 else 2)


def ring_group(dims: int, window: int, frames: int) -> int:
    """Heads of tokens that attend over time in one program, to a window and new frames: as many as registers hold."""
    held = power_of_two(dims, 16) * max(power_of_two(window), power_of_two(frames))
    return max(1, min(_GROUP, 8192 // held))
