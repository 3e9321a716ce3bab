"""Fused attention with alpha-entmax weights, in Triton: mathematics and equation numbers are those of model/entmax.py.

No (T, S) matrix is ever in memory. Whoever needs scores computes them again from q and k, tile by tile; only a few
numbers a row are kept. Four kernels:

    solve            walks the keys once for the largest score of each row, then once for every Newton step (2)
    attend           walks them once more and adds up the values; also those under u, which (3) needs
    query_gradient   for each tile of queries walks the keys
    key_gradient     for each tile of keys walks the queries

Shapes: B batch, H heads, T queries, S keys, D width of a head. q, k, v and their gradients are (B, T or S, H, D); what
is kept of a row is (B, H, T) in float32: top, its largest score; shift, e lam (less 1 where the powers are products, as
in entmax.py); rest, by which p moves along u so that the row sums to 1 in spite of the rounding of shift; mass, sum u.
POWER: 2 for sparsemax, 1 for entmax15, whose powers are products; 0: e of each head is read from e_ptr.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-errors

import triton
import triton.language as tl

SIZES = ("T", "S")  # of images, which vary: a kernel is compiled once for all of them
TINY = tl.constexpr(1e-30)
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _log1p(y):
    """log(1 + y) for y > -1. Near 0 by the series of atanh, because a GPU's logarithm is only absolutely exact there,
    and 1/e multiplies it."""
    z = tl.maximum(y, -0.5)
    z = z / (2.0 + z)
    w = z * z
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13 + w / 15))))))
    return tl.where(y > -0.5, 2.0 * z * series, tl.log2(1.0 + y) * 0.6931471805599453)


@triton.jit
def _powers(x, shift, e, POWER: tl.constexpr):
    """p and u of (1), and log t where powers are not products. x: scores less the largest; -inf gives 0."""
    if POWER == 2:
        t = tl.maximum(x - shift, 0.0)
        return t, tl.where(t > 0.0, 1.0, 0.0), t
    elif POWER == 1:
        t = tl.maximum(x * 0.5 - shift, 0.0)
        return t * t, t, t
    else:
        y = tl.maximum(x * e - shift, -1.0)
        log_t = _log1p(tl.maximum(y, -0.99999994))
        u = tl.where(y > -1.0, tl.exp2(log_t * ((1.0 / e - 1.0) * 1.4426950408889634)), 0.0)
        return (1.0 + y) * u, u, log_t


@triton.jit
def _move(s0, s1, e, POWER: tl.constexpr):
    """Step (2) of shift, which only grows."""
    excess = tl.maximum(s0, 1.0)
    s1 = tl.maximum(s1, TINY)
    if POWER == 2:
        return (excess - 1.0) / s1
    elif POWER == 1:
        return (excess - tl.sqrt(excess)) / s1
    else:
        g = e * tl.log2(excess) * 0.6931471805599453
        near = g * (1 - g / 2 * (1 - g / 3 * (1 - g / 4 * (1 - g / 5 * (1 - g / 6 * (1 - g / 7 * (1 - g / 8)))))))
        return tl.where(g < 0.5, near, 1.0 - tl.exp2(g * -1.4426950408889634)) * excess / s1


@triton.jit
def _tile(ptr, rows, count, stride, D: tl.constexpr):
    """(rows, D) of a matrix whose rows are so far apart; 0 beyond `count`."""
    d = tl.arange(0, D)
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=(rows < count)[:, None], other=0.0)


@triton.jit
def _scores(q, k, allowed_ptr, keys, S, scale, MASKED: tl.constexpr):
    """(queries, keys) in float32; -inf on padding and beyond S."""
    allowed = keys < S
    if MASKED:
        allowed = allowed & (tl.load(allowed_ptr + keys, mask=allowed, other=0) != 0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(allowed[None, :], scores, -float("inf"))


@triton.jit
def _kept(seed_ptr, head, rows, keys, T, S, dropout):
    """What dropout multiplies the weights by, (rows, keys): 0 or 1 / (1 - dropout)."""
    place = (head * T + rows[:, None]) * S + keys[None, :]
    return tl.where(tl.rand(tl.load(seed_ptr), place) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit(do_not_specialize=SIZES)
def solve(q_ptr, k_ptr, allowed_ptr, e_ptr, top_ptr, shift_ptr, T, S, H, scale,
          D: tl.constexpr, POWER: tl.constexpr, MASKED: tl.constexpr, STEPS: tl.constexpr,
          BT: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """top and shift of BT rows of one head."""
    head = tl.program_id(1)
    b, h = head // H, head % H
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    q = _tile(q_ptr + (b * T * H + h) * D, rows, T, H * D, D)
    k_ptr += (b * S * H + h) * D
    allowed_ptr += b * S
    e = tl.load(e_ptr + h)

    top = tl.full((BT,), LOWEST, tl.float32)
    for start in range(0, S, BS):
        keys = start + tl.arange(0, BS)
        k = _tile(k_ptr, keys, S, H * D, D)
        top = tl.maximum(top, tl.max(_scores(q, k, allowed_ptr, keys, S, scale, MASKED), 1))

    # The same rule as entmax.py's for when a step is so small that the next would move nothing.
    done = e * tl.exp2(tl.maximum(e, 2 / 3) * -23.0)
    shift = tl.full((BT,), 0.0 if POWER == 0 else -1.0, tl.float32)
    going, step = 1, 0
    while (going > 0) & (step < STEPS):
        s0 = tl.zeros((BT,), tl.float32)
        s1 = tl.zeros((BT,), tl.float32)
        for start in range(0, S, BS):
            keys = start + tl.arange(0, BS)
            k = _tile(k_ptr, keys, S, H * D, D)
            x = _scores(q, k, allowed_ptr, keys, S, scale, MASKED) - top[:, None]
            p, u, _ = _powers(x, shift[:, None], e, POWER)
            s0 += tl.sum(p, 1)
            s1 += tl.sum(u, 1)
        move = tl.where(rows < T, _move(s0, s1, e, POWER), 0.0)
        shift += move
        going = tl.max((move >= done).to(tl.int32), 0)
        step += 1

    row = head * T + rows
    tl.store(top_ptr + row, top, mask=rows < T)
    tl.store(shift_ptr + row, shift, mask=rows < T)


@triton.jit(do_not_specialize=SIZES)
def attend(q_ptr, k_ptr, v_ptr, allowed_ptr, e_ptr, seed_ptr, top_ptr, shift_ptr, rest_ptr, mass_ptr, out_ptr,
           under_u_ptr, T, S, H, scale, dropout,
           D: tl.constexpr, POWER: tl.constexpr, MASKED: tl.constexpr, DROPS: tl.constexpr,
           BT: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """BT rows of the output of one head; rest, mass and the sum of values under u, before it is divided by mass."""
    head = tl.program_id(1)
    b, h = head // H, head % H
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    row, first = head * T + rows, (b * T * H + h) * D
    q = _tile(q_ptr + first, rows, T, H * D, D)
    k_ptr += (b * S * H + h) * D
    v_ptr += (b * S * H + h) * D
    allowed_ptr += b * S
    e = tl.load(e_ptr + h)
    top = tl.load(top_ptr + row, mask=rows < T, other=0.0)
    shift = tl.load(shift_ptr + row, mask=rows < T, other=0.0)

    s0 = tl.zeros((BT,), tl.float32)
    s1 = tl.zeros((BT,), tl.float32)
    under_p = tl.zeros((BT, D), tl.float32)
    under_u = tl.zeros((BT, D), tl.float32)
    for start in range(0, S, BS):
        keys = start + tl.arange(0, BS)
        k = _tile(k_ptr, keys, S, H * D, D)
        v = _tile(v_ptr, keys, S, H * D, D)
        x = _scores(q, k, allowed_ptr, keys, S, scale, MASKED) - top[:, None]
        p, u, _ = _powers(x, shift[:, None], e, POWER)
        s0 += tl.sum(p, 1)
        s1 += tl.sum(u, 1)
        if DROPS:
            kept = _kept(seed_ptr, head, rows, keys, T, S, dropout)
            p *= kept
            u *= kept
        under_p = tl.dot(p.to(v.dtype), v, under_p, input_precision="ieee")
        under_u = tl.dot(u.to(v.dtype), v, under_u, input_precision="ieee")
    s1 = tl.maximum(s1, TINY)
    rest = tl.where(s0 > 0.0, (1.0 - s0) / s1, 0.0)  # a row without keys stays 0
    out = under_p + rest[:, None] * under_u

    inside = (rows < T)[:, None]
    place = first + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(out_ptr + place, out.to(q.dtype), mask=inside)
    tl.store(under_u_ptr + place, under_u, mask=inside)
    tl.store(rest_ptr + row, rest, mask=rows < T)
    tl.store(mass_ptr + row, s1, mask=rows < T)


@triton.jit
def _alpha_slope(p, u, log_t, e):
    """-dp/dalpha of (4): p l^2 f(-e l) with l = log t / e, which is (u - p + p log t) / e^2; near t = 1 by a series."""
    near = tl.minimum(-log_t, 0.5)
    f = 1 / 40320 + near * (1 / 362880 + near * (1 / 3628800 + near / 39916800))
    f = 1 / 2 + near * (1 / 6 + near * (1 / 24 + near * (1 / 120 + near * (1 / 720 + near * (1 / 5040 + near * f)))))
    scaled = log_t / e
    return tl.where(log_t > -0.5, p * scaled * scaled * f, (u - p + p * log_t) / (e * e))


@triton.jit(do_not_specialize=SIZES)
def query_gradient(q_ptr, k_ptr, v_ptr, allowed_ptr, e_ptr, seed_ptr, top_ptr, shift_ptr, rest_ptr, mass_ptr,
                   under_u_ptr, g_ptr, mean_ptr, dq_ptr, dalpha_ptr, T, S, H, scale, dropout,
                   D: tl.constexpr, POWER: tl.constexpr, MASKED: tl.constexpr, DROPS: tl.constexpr,
                   LEARNED: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """BT rows of q's gradient; `mean`, which (3) takes off the gradient of the weights; alpha's gradient of each row.

    g: gradient of the output."""
    head = tl.program_id(1)
    b, h = head // H, head % H
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    row, first = head * T + rows, (b * T * H + h) * D
    q = _tile(q_ptr + first, rows, T, H * D, D)
    g = _tile(g_ptr + first, rows, T, H * D, D)
    k_ptr += (b * S * H + h) * D
    v_ptr += (b * S * H + h) * D
    allowed_ptr += b * S
    e = tl.load(e_ptr + h)
    top = tl.load(top_ptr + row, mask=rows < T, other=0.0)
    shift = tl.load(shift_ptr + row, mask=rows < T, other=0.0)
    mass = tl.load(mass_ptr + row, mask=rows < T, other=1.0)
    under_u = _tile(under_u_ptr + first, rows, T, H * D, D)
    mean = tl.sum(g.to(tl.float32) * under_u, 1) / mass
    tl.store(mean_ptr + row, mean, mask=rows < T)

    dq = tl.zeros((BT, D), tl.float32)
    dalpha = tl.zeros((BT,), tl.float32)
    for start in range(0, S, BS):
        keys = start + tl.arange(0, BS)
        k = _tile(k_ptr, keys, S, H * D, D)
        v = _tile(v_ptr, keys, S, H * D, D)
        x = _scores(q, k, allowed_ptr, keys, S, scale, MASKED) - top[:, None]
        p, u, log_t = _powers(x, shift[:, None], e, POWER)
        of_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
        if DROPS:
            of_weights *= _kept(seed_ptr, head, rows, keys, T, S, dropout)
        centred = of_weights - mean[:, None]
        if LEARNED:
            dalpha -= tl.sum(_alpha_slope(p, u, log_t, e) * centred, 1)
        dq = tl.dot((u * centred).to(k.dtype), k, dq, input_precision="ieee")

    place = first + rows[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(dq_ptr + place, (dq * scale).to(q.dtype), mask=(rows < T)[:, None])
    if LEARNED:
        tl.store(dalpha_ptr + row, dalpha, mask=rows < T)


@triton.jit(do_not_specialize=SIZES)
def key_gradient(q_ptr, k_ptr, v_ptr, allowed_ptr, e_ptr, seed_ptr, top_ptr, shift_ptr, rest_ptr, mean_ptr, g_ptr,
                 dk_ptr, dv_ptr, T, S, H, scale, dropout,
                 D: tl.constexpr, POWER: tl.constexpr, MASKED: tl.constexpr, DROPS: tl.constexpr,
                 BT: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    """BS rows of the gradients of k and v."""
    head = tl.program_id(1)
    b, h = head // H, head % H
    keys = tl.program_id(0) * BS + tl.arange(0, BS)
    first = (b * S * H + h) * D
    k = _tile(k_ptr + first, keys, S, H * D, D)
    v = _tile(v_ptr + first, keys, S, H * D, D)
    q_ptr += (b * T * H + h) * D
    g_ptr += (b * T * H + h) * D
    allowed_ptr += b * S
    e = tl.load(e_ptr + h)

    dk = tl.zeros((BS, D), tl.float32)
    dv = tl.zeros((BS, D), tl.float32)
    for start in range(0, T, BT):
        rows = start + tl.arange(0, BT)
        row = head * T + rows
        q = _tile(q_ptr, rows, T, H * D, D)
        g = _tile(g_ptr, rows, T, H * D, D)
        top = tl.load(top_ptr + row, mask=rows < T, other=0.0)
        shift = tl.load(shift_ptr + row, mask=rows < T, other=0.0)
        rest = tl.load(rest_ptr + row, mask=rows < T, other=0.0)
        mean = tl.load(mean_ptr + row, mask=rows < T, other=0.0)
        x = _scores(q, k, allowed_ptr, keys, S, scale, MASKED) - top[:, None]
        p, u, _ = _powers(x, shift[:, None], e, POWER)
        p = p + rest[:, None] * u
        of_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
        if DROPS:
            kept = _kept(seed_ptr, head, rows, keys, T, S, dropout)
            of_weights *= kept
            p *= kept
        dv = tl.dot(tl.trans(p.to(g.dtype)), g, dv, input_precision="ieee")
        dk = tl.dot(tl.trans((u * (of_weights - mean[:, None])).to(q.dtype)), q, dk, input_precision="ieee")

    place = first + keys[:, None] * (H * D) + tl.arange(0, D)[None, :]
    inside = (keys < S)[:, None]
    tl.store(dk_ptr + place, (dk * scale).to(k.dtype), mask=inside)
    tl.store(dv_ptr + place, dv.to(v.dtype), mask=inside)
