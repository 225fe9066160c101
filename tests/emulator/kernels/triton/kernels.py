"""Triton kernels that judge the emulator. generate.py compiles them; tests/triton says what each computes.

Sizes are arguments, tile sizes are constants (upper case). Matrices are row-major: a is [m, k] or,
transposed, [k, m]; b is [k, n] or, transposed, [n, k]; c is [m, n].
"""

import triton
import triton.language as tl

# Elementwise


@triton.jit
def axpy(x, y, out, a, n, BLOCK: tl.constexpr):
    """out = a * x + y, with a ragged last block."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, a * tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


@triton.jit
def gated_silu(gate, up, out, n, BLOCK: tl.constexpr):
    """out = silu(gate) * up in f32, rounded once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu(x, out, BLOCK: tl.constexpr):
    """out = x * (1 + erf(x / sqrt(2))) / 2: erf comes from libdevice."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at).to(tl.float32)
    tl.store(out + at, (0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))).to(out.dtype.element_ty))


@triton.jit
def cast(x, out, BLOCK: tl.constexpr):
    """From one element type to another."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def integers(x, y, out, wide, BLOCK: tl.constexpr):
    """Signed division and remainder, shifts, logic; a 64-bit product, divided, and a high half."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at)
    b = tl.load(y + at)
    shift = b & 31
    mixed = (a // b) ^ ((a % b) << 7) ^ (a >> shift) ^ (a.to(tl.uint32) >> shift).to(tl.int32) ^ (~a & b)
    tl.store(out + at, mixed)
    product = a.to(tl.int64) * b.to(tl.int64)
    tl.store(wide + at, product // 1000 + tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int64))


@triton.jit
def philox(out, seed, BLOCK: tl.constexpr):
    """Four words of Philox 4x32-10 per counter."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r0, r1, r2, r3 = tl.randint4x(seed, at)
    tl.store(out + 4 * at, r0)
    tl.store(out + 4 * at + 1, r1)
    tl.store(out + 4 * at + 2, r2)
    tl.store(out + 4 * at + 3, r3)


# Reductions, scans, data movement


@triton.jit
def row_sums(x, out, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """One program sums ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row[:, None] * columns + at[None, :], mask=at[None, :] < columns, other=0.0)
    tl.store(out + row, tl.sum(v, axis=1))


@triton.jit
def column_sums(x, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum crosses warps."""
    row = tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.sum(tl.load(x + row[:, None] * BLOCK + at[None, :]), axis=0))


@triton.jit
def arg_max(x, value, index, columns, BLOCK: tl.constexpr):
    """Largest element of a row and the first place where it stands."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + at, mask=at < columns, other=float("-inf"))
    best, place = tl.max(v, axis=0, return_indices=True)
    tl.store(value + row, best)
    tl.store(index + row, place)


@triton.jit
def folds(x, out, BLOCK: tl.constexpr):
    """Largest, smallest, exclusive or and sum of a row of integers."""
    v = tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    to = out + 4 * tl.program_id(0)
    tl.store(to, tl.max(v, axis=0))
    tl.store(to + 1, tl.min(v, axis=0))
    tl.store(to + 2, tl.xor_sum(v, axis=0))
    tl.store(to + 3, tl.sum(v, axis=0))


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    """exp(x - max) / sum of a row."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row * columns + at, mask=at < columns, other=float("-inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(out + row * columns + at, (e / tl.sum(e, axis=0)).to(out.dtype.element_ty), mask=at < columns)


@triton.jit
def layer_norm(x, weight, bias, out, columns, epsilon, BLOCK: tl.constexpr):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    v = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(v, axis=0) / columns
    centred = tl.where(inside, v - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / columns + epsilon)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + at, (centred * scale * w + b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def running_sum(x, out, BLOCK: tl.constexpr):
    """Inclusive sums of a row."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.cumsum(tl.load(x + at), axis=0))


@triton.jit
def sort(x, out, BLOCK: tl.constexpr):
    """A row in ascending order: a bitonic network."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.sort(tl.load(x + at)))


@triton.jit
def transpose(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[j, i] = x[i, j], both sides in wide accesses."""
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    tile = tl.load(x + i[:, None] * COLUMNS + j[None, :])
    tl.store(out + j[:, None] * ROWS + i[None, :], tl.trans(tile))


@triton.jit
def gather(x, index, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[i, j] = x[index[i, j], j]."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + at, tl.gather(tl.load(x + at), tl.load(index + at), 0))


# Atomics


@triton.jit
def histogram(x, counts, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts of a block in shared memory, then added to the global ones."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    local = tl.histogram(tl.load(x + at, mask=at < n, other=0), BINS, mask=at < n)
    tl.atomic_add(counts + tl.arange(0, BINS), local, sem="relaxed")


@triton.jit
def atomics(x, index, sums, halves, largest, bits, BLOCK: tl.constexpr):
    """Float additions, an integer maximum and a logical or at places that collide."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at)
    to = tl.load(index + at)
    tl.atomic_add(sums + to, v.to(tl.float32), sem="relaxed")
    tl.atomic_add(halves + to, v.to(tl.float16))
    tl.atomic_max(largest + to, v, sem="release")
    tl.atomic_or(bits + to, 1 << (v & 31), sem="acq_rel", scope="sys")


@triton.jit
def guarded_sum(x, total, lock, BLOCK: tl.constexpr):
    """Every program adds its row to `total` by plain loads and stores while it holds a spin lock."""
    at = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * BLOCK + at)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(total + at, tl.load(total + at) + v)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


# Products through pointers


@triton.jit
def matmul(a, b, c, m, n, k, TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, RELU_A: tl.constexpr,
           PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = a * b with ragged edges. RELU_A clears negative elements of a first, which takes a through
    registers. With PARTS above 1, as many programs share a tile of c and add to it."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    if TRANS_A:
        a_at = a + depth[None, :] * m + rows[:, None]
        a_step = PARTS * BLOCK_K * m
    else:
        a_at = a + rows[:, None] * k + depth[None, :]
        a_step = PARTS * BLOCK_K
    if TRANS_B:
        b_at = b + columns[None, :] * k + depth[:, None]
        b_step = PARTS * BLOCK_K
    else:
        b_at = b + depth[:, None] * n + columns[None, :]
        b_step = PARTS * BLOCK_K * n
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for done in range(tl.program_id(2) * BLOCK_K, k, PARTS * BLOCK_K):
        left = k - done
        in_depth = tl.arange(0, BLOCK_K) < left
        x = tl.load(a_at, mask=(rows[:, None] < m) & in_depth[None, :], other=0.0)
        y = tl.load(b_at, mask=in_depth[:, None] & (columns[None, :] < n), other=0.0)
        if RELU_A:
            x = tl.maximum(x, 0)
        sums = tl.dot(x, y, sums, input_precision="tf32")
        a_at += a_step
        b_at += b_step
    c_at = c + rows[:, None] * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    if PARTS > 1:
        tl.atomic_add(c_at, sums, mask=inside, sem="relaxed")
    else:
        tl.store(c_at, sums.to(c.dtype.element_ty), mask=inside)


@triton.jit
def matmul_int4(a, b, scales, c, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = a * b * scales[n], where byte b[k / 2, n] holds two signed 4-bit numbers, the even row's low."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.arange(0, BLOCK_K // 2)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, k, BLOCK_K):
        x = tl.load(a + rows[:, None] * k + done + tl.arange(0, BLOCK_K)[None, :])
        packed = tl.load(b + (done // 2 + half)[:, None] * n + columns[None, :])
        low = ((packed << 4) >> 4).to(x.dtype)
        high = (packed >> 4).to(x.dtype)
        y = tl.join(low, high).permute(0, 2, 1).reshape(BLOCK_K, BLOCK_N)
        sums = tl.dot(x, y, sums)
    sums *= tl.load(scales + columns)[None, :]
    tl.store(c + rows[:, None] * n + columns[None, :], sums.to(c.dtype.element_ty))


@triton.jit
def moe(x, w, out, route_weights, slots, experts, num_slots, n, k, top_k, SCALE: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out[slot] = x[slot / top_k] * w[expert]^T. `slots` lists the slots of each expert, padded to blocks of
    BLOCK_M with `num_slots`; experts[block] is the expert of a block, or -1: then its rows are cleared."""
    block = tl.program_id(0)
    slot = tl.load(slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
    taken = slot < num_slots
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    out_at = out + slot[:, None] * n + columns[None, :]
    expert = tl.load(experts + block).to(tl.int64)
    if expert == -1:
        tl.store(out_at, tl.zeros((BLOCK_M, BLOCK_N), dtype=out.dtype.element_ty), mask=taken[:, None])
        return
    depth = tl.arange(0, BLOCK_K)
    x_at = x + (slot // top_k)[:, None] * k + depth[None, :]
    w_at = w + expert * n * k + columns[None, :] * k + depth[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, k, BLOCK_K):
        rows = tl.load(x_at, mask=taken[:, None] & (depth[None, :] < k - done), other=0.0)
        tile = tl.load(w_at, mask=depth[:, None] < k - done, other=0.0)
        sums = tl.dot(rows, tile, sums)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if SCALE:
        sums *= tl.load(route_weights + slot, mask=taken, other=0.0)[:, None]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=taken[:, None])


@triton.jit
def attention(q, k, v, out, length, scale, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              HEAD: tl.constexpr):
    """Softmax of q * k^T * scale over the keys, times v, in one pass; tensors are [head, length, HEAD]."""
    base = tl.program_id(1).to(tl.int64) * length * HEAD
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, HEAD)
    own = rows[:, None] < length
    query = tl.load(q + base + rows[:, None] * HEAD + channel[None, :], mask=own, other=0.0)
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_M, HEAD), dtype=tl.float32)
    end = tl.minimum(length, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else length
    for start in range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys[None, :] < length
        key = tl.load(k + base + keys[None, :] * HEAD + channel[:, None], mask=seen, other=0.0)
        scores = tl.dot(query, key) * scale
        if CAUSAL:
            seen = seen & (keys[None, :] <= rows[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        powers = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(largest - higher)
        weight = weight * fade + tl.sum(powers, axis=1)
        value_at = v + base + keys[:, None] * HEAD + channel[None, :]
        value = tl.load(value_at, mask=keys[:, None] < length, other=0.0)
        mixed = tl.dot(powers.to(value.dtype), value, mixed * fade[:, None])
        largest = higher
    mixed = mixed / weight[:, None]
    out_at = out + base + rows[:, None] * HEAD + channel[None, :]
    tl.store(out_at, mixed.to(out.dtype.element_ty), mask=own)


# Tensor descriptors made by the host


@triton.jit
def tensor_matmul(a, b, c, k, TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = a * b, one tile per program."""
    row = tl.program_id(0) * BLOCK_M
    column = tl.program_id(1) * BLOCK_N
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, k, BLOCK_K):
        x = a.load([done, row]).T if TRANS_A else a.load([row, done])
        y = b.load([column, done]).T if TRANS_B else b.load([done, column])
        sums = tl.dot(x, y, sums)
    c.store([row, column], sums.to(c.dtype))


@triton.jit
def tensor_matmul_persistent(a, b, c, m, n, k, PROGRAMS: tl.constexpr, SPECIALIZE: tl.constexpr,
                             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """c = a * b^T; PROGRAMS programs share the tiles. SPECIALIZE gives copies their own warps."""
    across = tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(m, BLOCK_M) * across, PROGRAMS):
        row = (tile // across) * BLOCK_M
        column = (tile % across) * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for done in tl.range(0, k, BLOCK_K, warp_specialize=SPECIALIZE):
            sums = tl.dot(a.load([row, done]), b.load([column, done]).T, sums)
        c.store([row, column], sums.to(c.dtype))


@triton.jit
def tensor_attention(q, k, v, out, length, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """As `attention`, causal, with one head."""
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    query = q.load([row, 0])
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_M, q.block_shape[1]), dtype=tl.float32)
    for start in range(0, tl.minimum(length, row + BLOCK_M), BLOCK_N):
        scores = tl.dot(query, k.load([start, 0]).T) * scale
        keys = start + tl.arange(0, BLOCK_N)
        scores = tl.where(keys[None, :] <= rows[:, None], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        powers = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(largest - higher)
        weight = weight * fade + tl.sum(powers, axis=1)
        mixed = tl.dot(powers.to(q.dtype), v.load([start, 0]), mixed * fade[:, None])
        largest = higher
    out.store([row, 0], (mixed / weight[:, None]).to(out.dtype))


@triton.jit
def tensor_copy_1d(x, out, shift, BLOCK: tl.constexpr):
    """Boxes moved by `shift`. What lies outside the tensor reads as 0 and is not written."""
    at = tl.program_id(0) * BLOCK
    out.store([at], x.load([at + shift]) + 1)


@triton.jit
def tensor_copy_2d(x, out, down, right, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr):
    i = tl.program_id(1) * BLOCK_0
    j = tl.program_id(0) * BLOCK_1
    out.store([i, j], x.load([i + down, j + right]) + 1)


@triton.jit
def tensor_copy_3d(x, out, down, right, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr):
    p = tl.program_id(2)
    i = tl.program_id(1) * BLOCK_1
    j = tl.program_id(0) * BLOCK_2
    out.store([p, i, j], x.load([p, i + down, j + right]) + 1)


@triton.jit
def tensor_copy_4d(x, out, down, right, BLOCK_2: tl.constexpr, BLOCK_3: tl.constexpr):
    """Boxes of two planes; the outer two dimensions are taken from the other way round."""
    i = tl.program_id(1) * BLOCK_2
    j = tl.program_id(0) * BLOCK_3
    p = tl.program_id(2)
    out.store([p, 0, i, j], x.load([0, p, i + down, j + right]).permute(1, 0, 2, 3) + 1)


@triton.jit
def tensor_copy_5d(x, out, down, right):
    """One box; the middle dimension is shifted, too."""
    out.store([0, 0, 0, 0, 0], x.load([0, 0, 1, down, right]) + 1)


@triton.jit
def tensor_add(x, out, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr):
    """Programs of the third grid dimension add their tiles to one another."""
    i = tl.program_id(1) * BLOCK_0
    j = tl.program_id(0) * BLOCK_1
    out.atomic_add([i, j], x.load([tl.program_id(2), i, j]).reshape(BLOCK_0, BLOCK_1))


@triton.jit
def tensor_max(x, out, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr):
    i = tl.program_id(1) * BLOCK_0
    j = tl.program_id(0) * BLOCK_1
    out.atomic_max([i, j], x.load([tl.program_id(2), i, j]).reshape(BLOCK_0, BLOCK_1))
