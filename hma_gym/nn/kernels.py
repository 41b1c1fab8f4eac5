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
def _fetch_weights(weight_EK, out, OUT: tl.constexpr, INNER: tl.constexpr, WHOLE_TILE: tl.constexpr):
    """Has the weights of outputs brought near."""
    LINE: tl.constexpr = 1024 // weight_EK.dtype.element_ty.primitive_bitwidth  # numbers of 128 bytes
    line = tl.arange(0, WHOLE_TILE // LINE) * LINE
    _fetch(weight_EK + tl.minimum(out, OUT - 1)[:, None] * INNER + tl.minimum(line, INNER - 1)[None, :])


@triton.jit
def _moments(x, alive, count):
    """Of rows (R, D): their mean, and the sum of squared deviations from it; ``count`` columns are ``alive``."""
    mean = tl.sum(tl.where(alive, x, 0.0), 1) / count
    off = tl.where(alive, x - mean[:, None], 0.0)
    return mean, tl.sum(off * off, 1)


@triton.jit
def _norm(
    moments_at,
    row_alive,
    EPSILON: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    PARTS_TILE: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Means of rows, and one over their standard deviations, of the moments of their parts."""
    part = tl.arange(0, PARTS_TILE)
    count = tl.maximum(tl.minimum(INNER - part * PART, PART), 0).to(tl.float32)
    known = row_alive[:, None] & (part < PARTS)[None, :]
    means = tl.load(moments_at[:, None] + part[None, :], mask=known, other=0.0, cache_modifier=CACHE)
    off = tl.load(moments_at[:, None] + PARTS + part[None, :], mask=known, other=0.0, cache_modifier=CACHE)
    mean = tl.sum(means * count[None, :], 1) / INNER
    away = means - mean[:, None]
    off = tl.sum(off + away * away * count[None, :], 1)
    return mean, tl.rsqrt(off / INNER + EPSILON)


@triton.jit(do_not_specialize=["rows", "tokens", "frames"])
def linear(
    x_RK,
    weight_EK,
    bias_E,
    columns_E,
    moments_R2P,
    other_RK,
    other_EK,
    residual_RE,
    y_RE,
    y_low_RE,
    y_moments_R2P,
    rows,
    tokens,
    frames,
    weight_row,
    weight_frame,
    vector_row,
    vector_frame,
    OUT: tl.constexpr,
    INNER: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    OWN: tl.constexpr,
    AGAIN: tl.constexpr,
    THEN: tl.constexpr,
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
    PARTS_TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y = [residual +] [gelu]([layer norm of] x weight' [+ other other_weight'] [+ bias]).

    A norm is one of the result, and x goes to the product as it lies in memory: with the mean m and the rate r of a
    row, r (x weight' - m columns), where ``columns`` are the sums of each output's weights. Moments of rows are given,
    by ``PARTS`` of ``PART`` columns each: the means of all, then the sums of squared deviations from them. Those of y,
    a part for each tile of columns, are written if ``MOMENTS``, and y once more in a lower precision if ``LOW``.

    If ``OWN``, weights, bias and columns are those of a row's frame, made by :func:`modulate` a few kernels before: the
    rows of a program are then of one frame.

    The other rows are x once more, as it is without its norm, if ``AGAIN``; or they are what the kernel before wrote,
    and x and its moments are older, if ``THEN``. A residual that the kernel before did not write is ``OLD_RESIDUAL``.

    ``WHOLE_TILE`` columns are all of the inner ones. Where ``INNER_TILE`` is as many, all is read at once.
    """
    if OWN:
        tiles = tl.cdiv(tokens, ROW_TILE)
        column = tl.program_id(0) // tiles
        place = tl.program_id(0) % tiles * ROW_TILE + tl.arange(0, ROW_TILE)
        row, row_alive = column * tokens + place, place < tokens
        weight_EK += (column // frames).to(tl.int64) * weight_row + column % frames * weight_frame
        vector = (column // frames).to(tl.int64) * vector_row + column % frames * vector_frame
        bias_E += vector
        columns_E += vector
    else:
        row = tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)
        row_alive = row < rows
    out = tl.program_id(1) * OUT_TILE + tl.arange(0, OUT_TILE)
    inner = tl.arange(0, INNER_TILE)
    out_alive = out < OUT
    row_at = row[:, None].to(tl.int64)  # more rows times columns than 32 bits hold
    from_x, from_weight = row_at * INNER + inner[None, :], out[None, :] * INNER + inner[:, None]
    here = row_at * OUT + out[None, :]
    alive = row_alive[:, None] & out_alive[None, :]
    x_alive = row_alive[:, None] & (inner < INNER)[None, :]
    told = out_alive[None, :] & (inner < INNER)[:, None]
    WHOLE: tl.constexpr = INNER_TILE == WHOLE_TILE
    CACHE: tl.constexpr = ".cg" if THEN else ""
    OWN_CACHE: tl.constexpr = ".cg" if OWN else ""

    # What was there before the kernel before.
    if WHOLE:
        weight = tl.load(weight_EK + from_weight, mask=told, other=0.0, cache_modifier=OWN_CACHE)
        if AGAIN or THEN:
            other_weight = tl.load(other_EK + from_weight, mask=told, other=0.0)
    elif EARLY:
        if not THEN:
            _fetch_weights(weight_EK, out, OUT, INNER, WHOLE_TILE)
        if AGAIN or THEN:
            _fetch_weights(other_EK, out, OUT, INNER, WHOLE_TILE)
    if BIAS:
        bias = tl.load(bias_E + out, mask=out_alive, other=0.0, cache_modifier=OWN_CACHE).to(tl.float32)
    if NORMALISE:
        columns = tl.load(columns_E + out, mask=out_alive, other=0.0, cache_modifier=OWN_CACHE)
    if OLD_RESIDUAL:
        residual = tl.load(residual_RE + here, mask=alive, other=0.0, cache_modifier=".cg")
    if not THEN:
        _begin(EARLY)

    if NORMALISE:
        moments_at = moments_R2P + row.to(tl.int64) * (2 * PARTS)
        mean, rate = _norm(moments_at, row_alive, EPSILON, INNER, PARTS, PART, PARTS_TILE, CACHE)
    if RESIDUAL and not OLD_RESIDUAL:
        residual = tl.load(residual_RE + here, mask=alive, other=0.0)
    sum_RE = tl.zeros((ROW_TILE, OUT_TILE), tl.float32)
    if WHOLE:
        x = tl.load(x_RK + from_x, mask=x_alive, other=0.0, cache_modifier=CACHE)
        sum_RE = tl.dot(x.to(weight.dtype), weight, sum_RE, input_precision=PRECISION)
    else:
        for k in range(0, INNER, INNER_TILE):
            k_alive = k + inner < INNER
            k_told = out_alive[None, :] & k_alive[:, None]
            k_known = row_alive[:, None] & k_alive[None, :]
            x = tl.load(x_RK + from_x + k, mask=k_known, other=0.0, cache_modifier=CACHE)
            weight = tl.load(weight_EK + from_weight + k, mask=k_told, other=0.0, cache_modifier=OWN_CACHE)
            sum_RE = tl.dot(x.to(weight.dtype), weight, sum_RE, input_precision=PRECISION)
    if NORMALISE:
        sum_RE = (sum_RE - mean[:, None] * columns[None, :]) * rate[:, None]
    if THEN:
        _begin(EARLY)
    if WHOLE:
        if THEN:
            x = tl.load(other_RK + from_x, mask=x_alive, other=0.0)
        if AGAIN or THEN:
            sum_RE = tl.dot(x.to(other_weight.dtype), other_weight, sum_RE, input_precision=PRECISION)
    elif AGAIN or THEN:
        for k in range(0, INNER, INNER_TILE):
            k_alive = k + inner < INNER
            k_told = out_alive[None, :] & k_alive[:, None]
            x = tl.load(other_RK + from_x + k, mask=row_alive[:, None] & k_alive[None, :], other=0.0)
            weight = tl.load(other_EK + from_weight + k, mask=k_told, other=0.0)
            sum_RE = tl.dot(x.to(weight.dtype), weight, sum_RE, input_precision=PRECISION)
    if BIAS:
        sum_RE += bias[None, :]
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
        y_moments_at = y_moments_R2P + row.to(tl.int64) * (2 * tl.num_programs(1)) + tl.program_id(1)
        tl.store(y_moments_at, y_mean, mask=row_alive)
        tl.store(y_moments_at + tl.num_programs(1), y_off, mask=row_alive)


@triton.jit(do_not_specialize=["frames"])
def modulate(
    weight_LEK,
    bias_LE,
    modulation_BTL2K,
    own_BTLEK,
    vectors_BTL2E,
    frames,
    modulation_row,
    modulation_frame,
    own_column,
    own_layer,
    vectors_column,
    vectors_layer,
    OUT: tl.constexpr,
    INNER: tl.constexpr,
    INNER_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Layers behind a modulation (shift, scale) as layers of what is not yet modulated, one for each frame of each row:
    weight (1 + scale), and the vectors weight shift + bias and, of each output, the sum of its new weights."""
    _begin(EARLY)
    layer, column = tl.program_id(1), tl.program_id(2)
    out, inner = tl.program_id(0) * OUT_TILE + tl.arange(0, OUT_TILE), tl.arange(0, INNER_TILE)
    known = inner < INNER
    row_at = (column // frames).to(tl.int64) * modulation_row + column % frames * modulation_frame
    modulation_at = modulation_BTL2K + row_at + layer * 2 * INNER + inner
    shift = tl.load(modulation_at, mask=known, other=0.0)
    scale = tl.load(modulation_at + INNER, mask=known, other=0.0)
    at = (layer * OUT + out)[:, None] * INNER + inner[None, :]
    alive = (out < OUT)[:, None] & known[None, :]
    weight = tl.load(weight_LEK + at, mask=alive, other=0.0).to(tl.float32)
    own = (weight * (1.0 + scale)[None, :]).to(own_BTLEK.dtype.element_ty)
    own_at = own_BTLEK + column.to(tl.int64) * own_column + layer * own_layer
    tl.store(own_at + out[:, None] * INNER + inner[None, :], own, mask=alive)
    bias = tl.load(bias_LE + layer * OUT + out, mask=out < OUT, other=0.0)
    vectors_at = vectors_BTL2E + column.to(tl.int64) * vectors_column + layer * vectors_layer + out
    tl.store(vectors_at, tl.sum(weight * shift[None, :], 1) + bias, mask=out < OUT)
    tl.store(vectors_at + OUT, tl.sum(own.to(tl.float32), 1), mask=out < OUT)


@triton.jit(do_not_specialize=["rows"])
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


@triton.jit(do_not_specialize=["tokens"])
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


@triton.jit(do_not_specialize=["tokens", "frames", "commit"])
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
    new_q = tl.load(first + new_GTK, mask=new_alive, other=0.0) * scale
    new_k = tl.load(first + WIDTH + new_GTK, mask=new_alive, other=0.0)
    new_v = tl.load(first + 2 * WIDTH + new_GTK, mask=new_alive, other=0.0)

    y_at = y_BTND + row.to(tl.int64) * frames * tokens * WIDTH + ring_GK
    for t in range(frames):
        q = tl.sum(tl.where((frame == t)[None, :, None], new_q, 0.0), 1)
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


@triton.jit(do_not_specialize=["positions", "all_positions", "frames"])
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


@triton.jit(do_not_specialize=["positions", "left"])
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
