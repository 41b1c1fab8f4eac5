"""The GPU kernels of :mod:`hma_gym.nn.fused`, in Triton: each does at once what are several operations of PyTorch.

What a frame of a few hundred tokens costs on a GPU is not arithmetic but the number of kernels, so each of these does
with a tile what comes before and after its product, and tiles are small enough that all of the GPU has work.

With ``EARLY`` a kernel begins while the one before it still runs ("programmatic dependent launch" of NVIDIA's compute
capability 9.0): it reads its weights, and waits before it reads what the one before it wrote. What kernels before that
one wrote is there, for each lets the next one begin only after it has waited itself; it is read past the cache of the
processor (".cg"), which may hold what was there before.

Shape legend: as :mod:`hma_gym.nn.transformer`; K inner dimension of a product, E its outputs, R rows of all frames
(B * T * N), F all logits of a position. Names ending in ``TILE`` are sizes of tiles, powers of two.
"""

# Triton reads the annotations of constants itself: they must not become strings.
from hma_gym.extras import require

triton = require("triton", extra="fused", purpose="fused steps of published models")
tl = require("triton.language", extra="fused", purpose="fused steps of published models")


@triton.jit
def _begin(EARLY: tl.constexpr):
    """From here on the kernel before is done, and the next one may be started."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _fetch(at):
    """Has the cache lines at these addresses brought near; what is there already matters no more than what is not."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.uint64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _weights(
    weight_at,
    modulation_at,
    k,
    told,
    INNER: tl.constexpr,
    OUT_TILE: tl.constexpr,
    NORM: tl.constexpr,
    MODULATE: tl.constexpr,
):
    """Weights (K, E) of inner columns ``k``, scaled if modulated; their sums, and what the shift adds to y, (E,)."""
    weight = tl.load(weight_at, mask=told, other=0.0)
    columns, added = tl.zeros((OUT_TILE,), tl.float32), tl.zeros((OUT_TILE,), tl.float32)
    if MODULATE:
        shift = tl.load(modulation_at + k, mask=k < INNER, other=0.0, cache_modifier=".cg")
        scale = tl.load(modulation_at + INNER + k, mask=k < INNER, other=0.0, cache_modifier=".cg")
        added = tl.sum(weight.to(tl.float32) * shift[:, None], 0)
        weight = (weight.to(tl.float32) * (1.0 + scale)[:, None]).to(weight.dtype)
    if NORM:
        columns = tl.sum(weight.to(tl.float32), 0)
    return weight, columns, added


@triton.jit
def _moments(x, alive, count):
    """Of rows (R, D): their mean, and the sum of squared deviations from it; ``count`` columns are ``alive``."""
    mean = tl.sum(tl.where(alive, x, 0.0), 1) / count
    off = tl.where(alive, x - mean[:, None], 0.0)
    return mean, tl.sum(off * off, 1)


@triton.jit
def linear(
    x_RK,
    weight_EK,
    bias_E,
    moments_RP2,
    modulation_BT2K,
    residual_RE,
    y_RE,
    y_low_RE,
    y_moments_RP2,
    rows,
    tokens,
    frames,
    modulation_row,
    modulation_frame,
    OUT: tl.constexpr,
    INNER: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    MODULATE: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OLD_RESIDUAL: tl.constexpr,
    LOW: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    INNER_TILE: tl.constexpr,
    WHOLE_TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y = [residual +] [gelu]([modulated] [layer norm of] x weight' [+ bias]); a modulation is (shift, scale).

    Nothing is done to x, which goes to the product as it lies in memory. A norm is one of the result: with the mean m
    and the rate r of a row, r (x weight' - m sum(weight)); a scale is one of the weights, a shift one of the result.
    Moments of rows are given, by ``PARTS`` of ``PART`` columns each: their mean, and the sum of squared deviations from
    it. Those of y, a part for each tile of columns, are written if ``MOMENTS``, and y once more in a lower precision if
    ``LOW``.

    ``WHOLE_TILE`` columns are all of the inner ones. Where ``INNER_TILE`` is as many, all is read at once. A residual
    that the kernel before did not write is ``OLD_RESIDUAL``. The rows of a program are of one frame if modulated.
    """
    if MODULATE:
        tiles = tl.cdiv(tokens, ROW_TILE)
        frame = tl.program_id(0) // tiles
        place = tl.program_id(0) % tiles * ROW_TILE + tl.arange(0, ROW_TILE)
        row, row_alive = frame * tokens + place, place < tokens
        modulation_at = modulation_BT2K + frame // frames * modulation_row + frame % frames * modulation_frame
    else:
        row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
        row_alive = row < rows
        modulation_at = modulation_BT2K
    out = tl.program_id(1) * OUT_TILE + tl.arange(0, OUT_TILE)
    inner = tl.arange(0, INNER_TILE)
    out_alive, inner_alive = out < OUT, inner < INNER
    row_at = row[:, None].to(tl.int64)  # more rows times columns than 32 bits hold
    x_at = x_RK + row_at * INNER + inner[None, :]
    weight_at = weight_EK + out[None, :] * INNER + inner[:, None]
    here = row_at * OUT + out[None, :]
    alive = row_alive[:, None] & out_alive[None, :]

    # What was there before the kernel before.
    if INNER_TILE == WHOLE_TILE:
        told = out_alive[None, :] & inner_alive[:, None]
        weight, columns, added = _weights(weight_at, modulation_at, inner, told, INNER, OUT_TILE, NORMALISE, MODULATE)
    else:
        columns, added = tl.zeros((OUT_TILE,), tl.float32), tl.zeros((OUT_TILE,), tl.float32)
        if EARLY:
            LINE: tl.constexpr = 1024 // weight_EK.dtype.element_ty.primitive_bitwidth  # numbers of 128 bytes
            line = tl.arange(0, WHOLE_TILE // LINE) * LINE
            _fetch(weight_EK + tl.minimum(out, OUT - 1)[:, None] * INNER + tl.minimum(line, INNER - 1)[None, :])
    if BIAS:
        added += tl.load(bias_E + out, mask=out_alive, other=0.0).to(tl.float32)
    if OLD_RESIDUAL:
        residual = tl.load(residual_RE + here, mask=alive, other=0.0, cache_modifier=".cg")
    _begin(EARLY)

    if RESIDUAL and not OLD_RESIDUAL:
        residual = tl.load(residual_RE + here, mask=alive, other=0.0)
    if NORMALISE:
        mean = tl.zeros((ROW_TILE,), tl.float32)
        off = tl.zeros((ROW_TILE,), tl.float32)
        moments_at = moments_RP2 + row.to(tl.int64) * PARTS * 2
        for part in tl.static_range(PARTS):  # of ever more columns, a part more each time
            share = 1.0 - part * PART / min(INNER, (part + 1) * PART)
            away = tl.load(moments_at + 2 * part, mask=row_alive, other=0.0) - mean
            off += tl.load(moments_at + 2 * part + 1, mask=row_alive, other=0.0) + away * away * (part * PART * share)
            mean += away * share
        rate = tl.rsqrt(off / INNER + EPSILON)
    if INNER_TILE == WHOLE_TILE:
        x = tl.load(x_at, mask=row_alive[:, None] & inner_alive[None, :], other=0.0)
        sum_RE = tl.dot(x.to(weight.dtype), weight, input_precision=PRECISION)
    else:
        sum_RE = tl.zeros((ROW_TILE, OUT_TILE), tl.float32)
        for k in range(0, INNER, INNER_TILE):
            k_alive = k + inner < INNER
            x = tl.load(x_at + k, mask=row_alive[:, None] & k_alive[None, :], other=0.0)
            told = out_alive[None, :] & k_alive[:, None]
            weight, more_columns, more_added = _weights(
                weight_at + k, modulation_at, k + inner, told, INNER, OUT_TILE, NORMALISE, MODULATE
            )
            if NORMALISE:
                columns += more_columns
            if MODULATE:
                added += more_added
            sum_RE = tl.dot(x.to(weight.dtype), weight, sum_RE, input_precision=PRECISION)
    if NORMALISE:
        sum_RE = (sum_RE - mean[:, None] * columns[None, :]) * rate[:, None]
    if BIAS or MODULATE:
        sum_RE += added[None, :]
    if GELU:
        sum_RE = 0.5 * sum_RE * (1.0 + tl.erf(sum_RE * 0.7071067811865476))
    if RESIDUAL:
        sum_RE += residual
    tl.store(y_RE + here, sum_RE.to(y_RE.dtype.element_ty), mask=alive)
    if LOW:
        tl.store(y_low_RE + here, sum_RE.to(y_low_RE.dtype.element_ty), mask=alive)
    if MOMENTS:
        many = tl.minimum(OUT - tl.program_id(1) * OUT_TILE, OUT_TILE)
        y_mean, y_off = _moments(sum_RE, out_alive[None, :], many)
        y_moments_at = y_moments_RP2 + (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2
        tl.store(y_moments_at, y_mean, mask=row_alive)
        tl.store(y_moments_at + 1, y_off, mask=row_alive)


@triton.jit
def moments(
    x_RD,
    low_RD,
    moments_R2,
    rows,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Of rows: their mean, and the sum of squared deviations from it; and they themselves in a lower precision."""
    _begin(EARLY)
    row, dim = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE), tl.arange(0, WIDTH_TILE)
    here = row[:, None].to(tl.int64) * WIDTH + dim[None, :]
    alive = (row < rows)[:, None] & (dim < WIDTH)[None, :]
    x = tl.load(x_RD + here, mask=alive, other=0.0)
    mean, off = _moments(x, alive, WIDTH)
    tl.store(moments_R2 + row * 2, mean, mask=row < rows)
    tl.store(moments_R2 + row * 2 + 1, off, mask=row < rows)
    if LOW:
        tl.store(low_RD + here, x.to(low_RD.dtype.element_ty), mask=alive)


@triton.jit
def attend_frame(
    qkv_R3D,
    y_RD,
    tokens,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Softmax attention among the tokens of a frame; a program is some queries of one head."""
    _begin(EARLY)
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    frame, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    query, dim = tl.program_id(0) * QUERY_TILE + tl.arange(0, QUERY_TILE), tl.arange(0, DIM_TILE)
    dim_alive = dim < HEAD_DIM
    first = qkv_R3D + frame.to(tl.int64) * tokens * 3 * WIDTH + head * HEAD_DIM
    alive = (query < tokens)[:, None] & dim_alive[None, :]
    q = tl.load(first + query[:, None] * 3 * WIDTH + dim[None, :], mask=alive, other=0.0)
    best = tl.full((QUERY_TILE,), float("-inf"), tl.float32)
    weight = tl.zeros((QUERY_TILE,), tl.float32)
    sum_QK = tl.zeros((QUERY_TILE, DIM_TILE), tl.float32)
    for begin in range(0, tokens, KEY_TILE):
        key = begin + tl.arange(0, KEY_TILE)
        at = first + key[:, None] * 3 * WIDTH + dim[None, :]
        known = (key < tokens)[:, None] & dim_alive[None, :]
        k = tl.load(at + WIDTH, mask=known, other=0.0)
        v = tl.load(at + 2 * WIDTH, mask=known, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        score = tl.where((key < tokens)[None, :], score, float("-inf"))
        better = tl.maximum(best, tl.max(score, 1))
        share, fade = tl.exp(score - better[:, None]), tl.exp(best - better)
        weight = weight * fade + tl.sum(share, 1)
        sum_QK = tl.dot(share.to(v.dtype), v, sum_QK * fade[:, None], input_precision=PRECISION)
        best = better
    y = (sum_QK / weight[:, None]).to(y_RD.dtype.element_ty)
    here = y_RD + frame.to(tl.int64) * tokens * WIDTH + head * HEAD_DIM
    tl.store(here + query[:, None] * WIDTH + dim[None, :], y, mask=alive)


@triton.jit
def attend_ring(
    qkv_BTN3D,
    keys_BWND,
    values_BWND,
    new_keys_BWND,
    new_values_BWND,
    step_B,
    y_BTND,
    tokens,
    frames,
    commit,
    cache_row,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    DIM_TILE: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    FRAME_TILE: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    COMMIT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Softmax attention over time of new frames to a ring buffer and each other; then commits the first ``commit``.

    A program is some heads of tokens of one row, in all new frames: nobody else reads or writes their keys and values,
    so that the buffer may be written in place.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    row = tl.program_id(1)
    group, dim = tl.program_id(0) * GROUP_TILE + tl.arange(0, GROUP_TILE), tl.arange(0, DIM_TILE)
    slot, frame = tl.arange(0, WINDOW_TILE), tl.arange(0, FRAME_TILE)
    alive_GK = (group < tokens * HEADS)[:, None] & (dim < HEAD_DIM)[None, :]
    step = tl.load(step_B + row, cache_modifier=".cg")
    back = (step - 1 - slot) % WINDOW
    held = step - 1 - tl.where(back < 0, back + WINDOW, back)  # the frame in each slot, see ring_positions()
    kept = (held >= 0) & (slot < WINDOW)

    # The window is the second axis: so one thread has all of it, and sums over it need no other.
    ring_GK = group[:, None] * HEAD_DIM + dim[None, :]
    slots_GWK = ring_GK[:, None, :] + slot[None, :, None] * tokens * WIDTH
    ring = row.to(tl.int64) * cache_row
    seen_GWK = alive_GK[:, None, :] & kept[None, :, None]
    past_k = tl.load(keys_BWND + ring + slots_GWK, mask=seen_GWK, other=0.0, cache_modifier=".cg").to(tl.float32)
    past_v = tl.load(values_BWND + ring + slots_GWK, mask=seen_GWK, other=0.0, cache_modifier=".cg").to(tl.float32)
    _begin(EARLY)

    own_GK = (group // HEADS)[:, None] * 3 * WIDTH + (group % HEADS)[:, None] * HEAD_DIM + dim[None, :]
    first = qkv_BTN3D + row.to(tl.int64) * frames * tokens * 3 * WIDTH
    new_GTK = own_GK[:, None, :] + frame[None, :, None] * tokens * 3 * WIDTH
    new_alive = alive_GK[:, None, :] & (frame < frames)[None, :, None]
    new_k = tl.load(first + WIDTH + new_GTK, mask=new_alive, other=0.0)
    new_v = tl.load(first + 2 * WIDTH + new_GTK, mask=new_alive, other=0.0)

    y_at = y_BTND + row.to(tl.int64) * frames * tokens * WIDTH + ring_GK
    for t in range(frames):
        q = tl.load(first + t * tokens * 3 * WIDTH + own_GK, mask=alive_GK, other=0.0) * scale
        seen, new = kept & (step + t - held < WINDOW), (frame <= t) & (t - frame < WINDOW)
        past_GS = tl.where(seen[None, :], tl.sum(past_k * q[:, None, :], 2), float("-inf"))
        new_GS = tl.where(new[None, :], tl.sum(new_k * q[:, None, :], 2), float("-inf"))
        best = tl.maximum(tl.max(past_GS, 1), tl.max(new_GS, 1))
        past_GS, new_GS = tl.exp(past_GS - best[:, None]), tl.exp(new_GS - best[:, None])
        y = tl.sum(past_v * past_GS[:, :, None], 1) + tl.sum(new_v * new_GS[:, :, None], 1)
        y = y / (tl.sum(past_GS, 1) + tl.sum(new_GS, 1))[:, None]
        tl.store(y_at + t * tokens * WIDTH, y.to(y_BTND.dtype.element_ty), mask=alive_GK)
    if COMMIT:
        tl.debug_barrier()  # all of the past is read
        stays = (frame < commit) & (frame >= commit - WINDOW)
        into = ring + ring_GK[:, None, :] + ((step + frame) % WINDOW)[None, :, None] * tokens * WIDTH
        into_alive = alive_GK[:, None, :] & stays[None, :, None]
        tl.store(new_keys_BWND + into, new_k.to(new_keys_BWND.dtype.element_ty), mask=into_alive)
        tl.store(new_values_BWND + into, new_v.to(new_values_BWND.dtype.element_ty), mask=into_alive)


@triton.jit
def embed(
    tokens_BTN,
    masked_BTN,
    tables_FD,
    mask_D,
    action_BTD,
    position_WMD,
    step_B,
    x_BTMD,
    positions,
    all_positions,
    frames,
    action_row,
    action_frame,
    FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Columns of frames: tokens of a factorised vocabulary (or what stands for hidden ones), then the action, M in all,
    and their position in time; the first frame's is ``step_B``."""
    _begin(EARLY)
    column = tl.program_id(1)
    row, frame = column // frames, column % frames
    place = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    dim = tl.arange(0, WIDTH_TILE)
    dim_alive = dim < WIDTH
    is_token = place < positions
    at = column * positions + place
    rest = tl.load(tokens_BTN + at, mask=is_token, other=0)
    hidden = tl.load(masked_BTN + at, mask=is_token, other=0) != 0
    x = tl.zeros((ROW_TILE, WIDTH_TILE), tl.float32)
    shown = (is_token & ~hidden)[:, None] & dim_alive[None, :]
    for i in tl.static_range(FACTORS):
        entry = i * SIZE + rest % SIZE
        x += tl.load(tables_FD + entry[:, None] * WIDTH + dim[None, :], mask=shown, other=0.0).to(tl.float32)
        rest = rest // SIZE
    mask = tl.load(mask_D + dim, mask=dim_alive, other=0.0).to(tl.float32)
    action_at = action_BTD + row * action_row + frame * action_frame
    action = tl.load(action_at + dim, mask=dim_alive, other=0.0).to(tl.float32)
    x = tl.where(hidden[:, None], mask[None, :], x)
    x = tl.where(is_token[:, None], x, action[None, :])
    time = tl.load(step_B + row) + frame
    alive = (place < all_positions)[:, None] & dim_alive[None, :]
    x += tl.load(position_WMD + (time * all_positions + place)[:, None] * WIDTH + dim[None, :], mask=alive, other=0.0)
    tl.store(x_BTMD + (column * all_positions + place)[:, None] * WIDTH + dim[None, :], x, mask=alive)


@triton.jit
def _mixed(x):
    """SplitMix64 of unsigned numbers, see :mod:`hma_gym.nn.noise`."""
    x = (x ^ (x >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, step, STREAM: tl.constexpr, index):
    """As :func:`hma_gym.nn.noise.uniform`, bit for bit."""
    golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    row = _mixed(_mixed(_mixed(seed.to(tl.uint64) * golden) + step.to(tl.uint64)) ^ STREAM)
    bits = _mixed(row + (index + 1).to(tl.uint64) * golden) >> 41
    return (bits.to(tl.float32) + 0.5) / 8388608.0


@triton.jit
def unmask(
    logits_BNF,
    tokens_BN,
    masked_BN,
    seed_B,
    step_B,
    new_tokens_BN,
    new_masked_BN,
    positions,
    left,
    STREAM: tl.constexpr,
    FACTORS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_TILE: tl.constexpr,
    POSITIONS_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Likeliest tokens where hidden, and which positions stay hidden when ``left`` of them do, in a random order."""
    _begin(EARLY)
    row = tl.program_id(1)
    place = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
    alive = place < positions
    at = row * positions + place
    hidden = tl.load(masked_BN + at, mask=alive, other=0) != 0
    token = tl.zeros((ROW_TILE,), tl.int64)
    digit = tl.arange(0, SIZE_TILE)
    worth = 1
    known = alive[:, None] & (digit < SIZE)[None, :]
    for i in tl.static_range(FACTORS):
        score_at = logits_BNF + (at * FACTORS + i)[:, None] * SIZE + digit[None, :]
        score = tl.load(score_at, mask=known, other=float("-inf"))
        token += tl.argmax(score, 1).to(tl.int64) * worth
        worth = worth * SIZE
    old = tl.load(tokens_BN + at, mask=alive, other=0)
    tl.store(new_tokens_BN + at, tl.where(hidden, token, old), mask=alive)

    seed, step = tl.load(seed_B + row), tl.load(step_B + row)
    other = tl.arange(0, POSITIONS_TILE)
    other_hidden = tl.load(masked_BN + row * positions + other, mask=other < positions, other=0) != 0
    mine = tl.where(hidden, _uniform(seed, step, STREAM, place), float("inf"))
    theirs = tl.where(other_hidden, _uniform(seed, step, STREAM, other), float("inf"))
    ahead = (theirs[None, :] > mine[:, None]) | ((theirs[None, :] == mine[:, None]) & (other[None, :] < place[:, None]))
    rank = tl.sum((ahead & (other < positions)[None, :]).to(tl.int32), 1)
    tl.store(new_masked_BN + at, hidden & (rank >= positions - left), mask=alive)


#: Whether they are interpreted on a CPU: Triton was told so before it was imported.
INTERPRETED = not isinstance(linear, triton.JITFunction)
