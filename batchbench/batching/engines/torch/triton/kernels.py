"""The Triton kernels of a GPU's passes: attention over the slot cache, norms, and the next token.

Every kernel is one launch. Lengths, slots and positions are read on the device, so a CUDA graph
that holds these kernels is correct for every length. ``ops.py`` has the functions that launch them.
The kernels use the part of the language that Triton 3.4 to 3.9 share, and its interpreter
(``TRITON_INTERPRET=1``) runs them on a CPU.

Numbers are loaded in the model's format, computed in float32, and rounded once when stored.
Tensors that a model lacks are None, for which a kernel is compiled anew.
"""

import triton
import triton.language as tl

# Annotations must be objects here: Triton's interpreter does not read them as text.


@triton.jit
def decode_attention(
    q,  # [rows, heads, size], the last two contiguous, as are those of k and v
    k,  # [rows, kv_heads, size]
    v,
    cache,  # [2, slots, kv_heads, max_len, size]
    out,  # [rows, heads, size]
    angles,  # [positions, size]: cosines, then sines, of a head's halves; or None
    q_norm,  # [size], the weight of the norm of each head of queries; or None
    k_norm,
    eps,
    q_row,
    kv_row,
    max_len,
    values,  # the place of the first value in the cache
    scale,  # in powers of two
    slots,  # [rows]
    positions,  # [rows]
    partial,  # [rows, heads, splits, size + 2] in float32
    arrived,  # [rows, heads]; zeros before and after
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write the key and value of each row to the cache, and attend to its slot up to there.

    A program computes one head of a row over ``SPLIT`` keys; the last one of a head combines the
    parts. A row's own key and value come from ``k`` and ``v``: programs read what no other writes.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row).to(tl.int32)  # places within a slot need no more
    used = position // SPLIT + 1
    if split >= used:
        return
    dim = tl.arange(0, WIDTH)
    real = dim < SIZE
    query = q + row * q_row + head * SIZE
    query = _turned(query, position, angles, q_norm, eps, dim, real, SIZE).to(tl.float32) * scale
    stop = tl.minimum(position, (split + 1) * SPLIT)
    keys = cache + (tl.load(slots + row) * (HEADS // GROUP) + head // GROUP) * max_len * SIZE
    highest, total, seen = _read(query, keys, values, split * SPLIT, stop, SIZE, WIDTH, KEYS)
    if split == used - 1:
        own = row * kv_row + (head // GROUP) * SIZE
        key = _turned(k + own, position, angles, k_norm, eps, dim, real, SIZE)
        value = tl.load(v + own + dim, mask=real, other=0.0)
        if head % GROUP == 0:
            tl.store(keys + position * SIZE + dim, key, mask=real)
            tl.store(keys + values + position * SIZE + dim, value, mask=real)
        score = tl.sum(query * key.to(tl.float32), 0)
        highest, total, seen = _join(highest, total, seen, score, 1.0, value.to(tl.float32))
    nth = row * HEADS + head
    result, parts = out + nth * SIZE, partial + nth * tl.num_programs(2) * (SIZE + 2)
    _hand_in(highest, total, seen, result, parts, arrived + nth, split, used, SIZE, WIDTH)


@triton.jit
def _turned(head, position, angles, weight, eps, dim, inside, SIZE):
    """Load a head of queries or keys, apply its norm, and rotate it by its position.

    A number is rotated with the one that is half a head away. ``head`` is the place of one head, or
    of several, ``[tokens, 1]``, as is ``position``.
    """
    states = tl.load(head + dim, mask=inside, other=0.0)
    if angles is not None:
        half = SIZE // 2
        across = (dim + half) % SIZE
        x = states.to(tl.float32)
        y = tl.load(head + across, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            spread = tl.sqrt(tl.sum(x * x, axis=-1, keep_dims=True) / SIZE + eps)
            x = x / spread * tl.load(weight + dim, mask=dim < SIZE, other=0.0).to(tl.float32)
            y = y / spread * tl.load(weight + across, mask=dim < SIZE, other=0.0).to(tl.float32)
        angle = angles + position * SIZE + dim % half
        cos = tl.load(angle, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(angle + half, mask=inside, other=0.0).to(tl.float32)
        states = (x * cos + tl.where(dim < half, -y, y) * sin).to(states.dtype)
    return states


@triton.jit
def _read(query, keys, values, first, stop, SIZE, WIDTH, KEYS):
    """Attend to the cached positions ``first`` to ``stop``; return a running softmax.

    It is the highest score, the sum of weights and the weighted sum of values.
    """
    dim = tl.arange(0, WIDTH)
    highest, total, seen = -float("inf"), 0.0, tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(first, stop, KEYS):
        at = start + tl.arange(0, KEYS)
        place = at[:, None] * SIZE + dim[None, :]
        inside = (at < stop)[:, None] & (dim < SIZE)[None, :]
        key = tl.load(keys + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(keys + values + place, mask=inside, other=0.0).to(tl.float32)
        score = tl.where(at < stop, tl.sum(query[None, :] * key, 1), -float("inf"))
        higher = tl.max(score, 0)
        weight = tl.exp2(score - higher)
        now = tl.sum(weight[:, None] * value, 0)
        highest, total, seen = _join(highest, total, seen, higher, tl.sum(weight, 0), now)
    return highest, total, seen


@triton.jit
def _join(highest, total, seen, highest_2, total_2, seen_2):
    """Join two running softmaxes; the second has at least one key."""
    higher = tl.maximum(highest, highest_2)
    before = tl.exp2(highest - higher)
    now = tl.exp2(highest_2 - higher)
    return higher, total * before + total_2 * now, seen * before + seen_2 * now


@triton.jit
def _hand_in(highest, total, seen, result, parts, arrived, split, used, SIZE, WIDTH):
    """Store the result of a head, or one part of it; the last part to come combines them all."""
    dim = tl.arange(0, WIDTH)
    real = dim < SIZE
    if used == 1:
        tl.store(result + dim, (seen / total).to(result.dtype.element_ty), mask=real)
    else:
        part = parts + split * (SIZE + 2)
        tl.store(part + dim, seen, mask=real)
        tl.store(part + SIZE, highest)
        tl.store(part + SIZE + 1, total)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived, 1) == used - 1:
            _combine(parts, result, used, SIZE, WIDTH)
            tl.store(arrived, 0)


@triton.jit
def _combine(parts, result, used, SIZE, WIDTH):
    """Combine ``used`` parts of a head; ``.cg`` reads what other processors have just written."""
    dim = tl.arange(0, WIDTH)
    real = dim < SIZE
    highest, total, seen = -float("inf"), 0.0, tl.zeros([WIDTH], dtype=tl.float32)
    for split in range(used):
        part = parts + split * (SIZE + 2)
        score = tl.load(part + SIZE, cache_modifier=".cg")
        weight = tl.load(part + SIZE + 1, cache_modifier=".cg")
        value = tl.load(part + dim, mask=real, other=0.0, cache_modifier=".cg")
        highest, total, seen = _join(highest, total, seen, score, weight, value)
    tl.store(result + dim, (seen / total).to(result.dtype.element_ty), mask=real)


@triton.jit
def tile_attention(
    q,  # [tokens, heads, size]; this and the next are as in decode_attention, up to scale
    k,
    v,
    cache,
    out,
    angles,
    q_norm,
    k_norm,
    eps,
    q_row,
    kv_row,
    max_len,
    values,
    scale,
    tiles,  # [tiles, 5]: token, count, first token of its piece, slot, position of the piece
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    TOKENS: tl.constexpr,
    DOT: tl.constexpr,  # the number format of products
):
    """Write keys and values of a tile of tokens to the cache, and attend to all before each.

    A piece is a decoding row or a chunk of a prompt; a tile is up to ``TOKENS`` of its tokens, and
    none if its count is 0. Keys of the piece come from ``k``, keys before it from the cache.
    """
    base = tiles + tl.program_id(0) * 5
    head = tl.program_id(1)
    count = tl.load(base + 1).to(tl.int32)
    if count == 0:
        return
    token, piece = tl.load(base).to(tl.int32), tl.load(base + 2).to(tl.int32)
    start = tl.load(base + 4).to(tl.int32)
    dim = tl.arange(0, WIDTH)[None, :]
    at = token + tl.arange(0, TOKENS)
    mine = (at < token + count)[:, None] & (dim < SIZE)
    position = (start - piece + at)[:, None]
    keys = cache + (tl.load(base + 3) * (HEADS // GROUP) + head // GROUP) * max_len * SIZE
    k, v = k + (head // GROUP) * SIZE, v + (head // GROUP) * SIZE
    if head % GROUP == 0:
        place = keys + position * SIZE + dim
        key = k + at[:, None] * kv_row
        tl.store(place, _turned(key, position, angles, k_norm, eps, dim, mine, SIZE), mask=mine)
        value = tl.load(v + at[:, None] * kv_row + dim, mask=mine, other=0.0)
        tl.store(place + values, value, mask=mine)
    query = q + at[:, None] * q_row + head * SIZE
    query = _turned(query, position, angles, q_norm, eps, dim, mine, SIZE).to(DOT)
    seen = _attend(
        query, keys, values, k, v, kv_row, at, piece, token + count, start, scale,
        angles, k_norm, eps, SIZE, KEYS, DOT
    )  # fmt: skip
    result = out + (at[:, None] * HEADS + head) * SIZE + dim
    tl.store(result, seen.to(out.dtype.element_ty), mask=mine)


@triton.jit
def _attend(
    query, keys, values, k, v, kv_row, at, piece, end, start, scale, angles, k_norm, eps, SIZE,
    KEYS, DOT
):  # fmt: skip
    """Attend to positions before the piece, then to the piece itself, up to each token.

    ``query`` is ``[tokens, width]``, of the tokens ``at`` in the pass. ``keys`` are of the slot in
    the cache; ``k`` and ``v`` are of the pass. The piece begins at position ``start``.
    """
    tokens: tl.constexpr = query.shape[0]
    highest = tl.full([tokens], -float("inf"), dtype=tl.float32)
    total = tl.zeros([tokens], dtype=tl.float32)
    seen = tl.zeros(query.shape, dtype=tl.float32)
    last = tl.zeros([tokens], dtype=tl.int32) + start - 1
    for first in range(0, start, KEYS):
        score, value = _score(
            query, keys, keys + values, SIZE, first, start, last, 0, None, None, eps, SIZE, KEYS
        )
        highest, total, seen = _add_keys(score * scale, value, highest, total, seen, DOT)
    # Loading four times as much ahead would take more shared memory than some GPUs have.
    for first in tl.range(piece, end, KEYS, num_stages=3 if angles is None else 1):
        before = start - piece
        score, value = _score(
            query, k, v, kv_row, first, end, at, before, angles, k_norm, eps, SIZE, KEYS
        )
        highest, total, seen = _add_keys(score * scale, value, highest, total, seen, DOT)
    return seen / total[:, None]


@triton.jit
def _score(query, keys, values, row, first, stop, last, before, angles, k_norm, eps, SIZE, KEYS):
    """Return products, ``[tokens, keys]``, and values of the keys from ``first`` up to ``stop``.

    Keys lie ``row`` apart, and ``before`` is added to their places to get positions. Each token
    sees the keys up to ``last``, ``[tokens]``.
    """
    dim = tl.arange(0, query.shape[1])[None, :]
    at = first + tl.arange(0, KEYS)
    place = at[:, None] * row
    inside = (at < stop)[:, None] & (dim < SIZE)
    key = _turned(keys + place, (before + at)[:, None], angles, k_norm, eps, dim, inside, SIZE)
    score = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
    score = tl.where(at[None, :] <= last[:, None], score, -float("inf"))
    return score, tl.load(values + place + dim, mask=inside, other=0.0)


@triton.jit
def _add_keys(score, value, highest, total, seen, DOT):
    """Add keys to the running softmax of each token of a tile."""
    higher = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - higher[:, None])
    before = tl.exp2(highest - higher)
    rounded = weight.to(value.dtype).to(DOT)
    now = tl.dot(rounded, value.to(DOT), input_precision="ieee")
    return higher, total * before + tl.sum(weight, 1), seen * before[:, None] + now


@triton.jit
def add_norm(
    x,  # [any, width]
    x_rows,  # [rows]: the row of x for each program; None for its own, as are those of y
    y,  # [any, width]; None to add none
    y_rows,
    added,  # [width], the bias of the product that made y; None to add none
    total,  # [rows, width], out, may be x; None to store no sum
    weight,  # [width], of the norm
    bias,  # [width]; None for a norm by the root mean square
    normed,  # [rows, width], out
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a product and its bias to the residual stream, or embeddings; apply the next norm."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    real = at < WIDTH
    value = tl.load(_row(x, x_rows, WIDTH) + at, mask=real, other=0.0).to(tl.float32)
    if y is not None:
        value += tl.load(_row(y, y_rows, WIDTH) + at, mask=real, other=0.0).to(tl.float32)
    if added is not None:
        value += tl.load(added + at, mask=real, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + row * WIDTH + at, value.to(total.dtype.element_ty), mask=real)
    if bias is not None:
        value = tl.where(real, value - tl.sum(value, 0) / WIDTH, 0.0)
    spread = tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)
    result = value / spread * tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + at, mask=real, other=0.0).to(tl.float32)
    tl.store(normed + row * WIDTH + at, result.to(normed.dtype.element_ty), mask=real)


@triton.jit
def _row(x, rows, WIDTH):
    """Return the place of the row of ``x`` that the program reads."""
    row = tl.program_id(0).to(tl.int64)
    if rows is not None:
        row = tl.load(rows + row).to(tl.int64)
    return x + row * WIDTH


@triton.jit
def swiglu(
    product,  # [tokens, 2 × inner]: gates, then what they multiply
    out,  # [tokens, inner]
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute silu(gate) × up, the activation between the products of a gated MLP."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < INNER
    place = product + token * 2 * INNER + at
    gate = tl.load(place, mask=real, other=0.0).to(tl.float32)
    up = tl.load(place + INNER, mask=real, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # never an overflow
    result = gate * tl.where(gate < 0, small, 1.0) / (1.0 + small) * up
    tl.store(out + token * INNER + at, result.to(out.dtype.element_ty), mask=real)


@triton.jit
def _gumbel(tokens, one, two):
    """Return the noise of tokens for the two keys of a row, as sampling.py has it."""
    x = tokens.to(tl.uint32) ^ one.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 17)) * 0xED5AD4BB + two.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    x = (x ^ (x >> 14)) >> 1
    # 2^-31, 2^-32 and 1 - 2^-24
    uniform = x.to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    uniform = tl.minimum(uniform, 0.9999999403953552)
    # A GPU's logarithm is wrong near 1, so -log(1 - uniform) is atanh's series there.
    s = uniform / (2 - uniform)
    square = s * s
    series = 2 / 3 + square * (2 / 5 + square * (2 / 7 + square * (2 / 9)))
    small = s * (2 + square * series)
    return -tl.log(tl.where(uniform < 0.25, small, -tl.log(1 - uniform)))


@triton.jit
def best_of_parts(
    logits,  # [rows, at least vocabulary]
    values,  # [rows, parts] in float32, out
    tokens,  # [rows, parts], out
    keys,  # [rows, 2] in int32, of the noise; None to add none
    least,  # [rows], the smallest logits that are kept; None to keep all
    temperature,
    stride,
    vocabulary,
    PART: tl.constexpr,
):
    """Find the largest logit of each part of a row, the first of equals; NaN is the largest."""
    row, part = tl.program_id(0), tl.program_id(1)
    at = part * PART + tl.arange(0, PART)
    inside = at < vocabulary
    value = tl.load(logits + row * stride + at, mask=inside, other=-float("inf")).to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    if least is not None:
        value = tl.where(value >= tl.load(least + row), value, -float("inf"))
    if keys is not None:
        one, two = tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1)
        value += temperature * _gumbel(at, one, two)
        value = tl.where(inside, value, -float("inf"))
    largest = tl.max(value, 0)
    token = tl.min(tl.where((value == largest) & inside, at, vocabulary), 0)
    place = row * tl.num_programs(1) + part
    tl.store(values + place, largest)
    tl.store(tokens + place, token.to(tl.int64))


@triton.jit
def best_of_all(
    values,  # [rows, parts]
    tokens,  # [rows, parts]
    out,  # [rows]
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Choose the best token of all parts of a row."""
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    value = tl.load(values + row * PARTS + part, mask=part < PARTS, other=-float("inf"))
    token = tl.load(tokens + row * PARTS + part, mask=part < PARTS, other=2**62)
    largest = tl.max(value, 0)
    tl.store(out + row, tl.min(tl.where(value == largest, token, 2**62), 0))
