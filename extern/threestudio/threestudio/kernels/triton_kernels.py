"""The Triton kernels of the hash grid: one program computes one level for a block of points.

Level is the slow launch axis, so that the blocks which run together read one level's table and it
stays in the L2 cache. Each corner is one [block, features] tile: both features of an entry come in
one 8-byte load, and go in one packed reduction where the GPU has it. Features are stored feature
by feature, so that neighbours in the block write neighbours in memory. Sums are in fp32 whatever
the tables' type.

Every kernel sums up to two grids over the same points: if STATIC one over the leading D
coordinates, if DYNAMIC one over D + 1. Both have the same scales, so cells and weights are computed
once, and a corner of the second shares the spatial part of its index with one of the first.

`levels` holds for each level: the resolution, and for each grid its entries, its first entry and
whether it is hashed.
"""

import triton
import triton.language as tl

# Triton reads global numbers in kernels only if they are constexpr.
_LIMIT = tl.constexpr(2.0**30)  # as COORDINATE_LIMIT of the twin
_PRIME_Y = tl.constexpr(2654435761)
_PRIME_Z = tl.constexpr(805459861)
_PRIME_T = tl.constexpr(3674653429)


@triton.jit
def _coordinate(x_ptr, point, inside, axis: tl.constexpr, n_axes: tl.constexpr, scale):
    """Cell along an axis, modulo 2^32, the fraction within it, and d(fraction) / d(x)."""
    x = tl.load(x_ptr + point * n_axes + axis, mask=inside, other=0.0)
    position = x * scale + 0.5
    kept = tl.clamp(position, -_LIMIT, _LIMIT, propagate_nan=tl.PropagateNan.ALL)
    cell = tl.floor(kept)
    # A point that is no number names no cell; its fraction, and so its features, stay no numbers.
    number = tl.where(cell == cell, cell, 0.0).to(tl.int32).to(tl.uint32, bitcast=True)
    return number, kept - cell, tl.where(position == kept, scale, 0.0)


@triton.jit
def _end(cell, fraction, bit: tl.constexpr):
    """Vertex at one end of a cell, and its weight."""
    if bit == 1:
        return cell + 1, fraction
    else:
        return cell, 1.0 - fraction


@triton.jit
def _level(levels_ptr, level, grid: tl.constexpr):
    """Entries, first entry, and whether the level is hashed, of the static (0) or dynamic (1)."""
    base = levels_ptr + level * 7 + 1 + 3 * grid
    return tl.load(base).to(tl.uint32), tl.load(base + 1), tl.load(base + 2)


@triton.jit
def _spatial(a, b, c, resolution, D: tl.constexpr):
    """Dense and hashed number of a vertex before they are brought into the level's range."""
    dense = a + b * resolution
    mixed = a ^ (b * _PRIME_Y)
    if D == 3:
        dense += c * (resolution * resolution)
        mixed ^= c * _PRIME_Z
    return dense, mixed


@triton.jit
def _entry(dense, mixed, entries, hashed):
    """Index within the level. A hashed level has 2^k entries, whose remainder is a mask."""
    if hashed != 0:
        index = mixed & (entries - 1)
    else:
        index = dense % entries
    return index


@triton.jit
def forward_kernel(
    x_ptr,
    static_ptr,
    dynamic_ptr,
    out_ptr,
    scales_ptr,
    levels_ptr,
    n,
    N_AXES: tl.constexpr,
    D: tl.constexpr,
    STATIC: tl.constexpr,
    DYNAMIC: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[level F + f, point] = sum over the corners of weight times table entry."""
    level = tl.program_id(1)
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = point < n
    feature = tl.arange(0, F)
    scale = tl.load(scales_ptr + level)
    res = tl.load(levels_ptr + level * 7).to(tl.uint32)
    entries, first, hashed = _level(levels_ptr, level, 0)
    entries_t, first_t, hashed_t = _level(levels_ptr, level, 1)
    x0, u0, _s0 = _coordinate(x_ptr, point, inside, 0, N_AXES, scale)
    x1, u1, _s1 = _coordinate(x_ptr, point, inside, 1, N_AXES, scale)
    x2, u2, x3, u3 = x1, u1, x1, u1
    if D == 3:
        x2, u2, _s2 = _coordinate(x_ptr, point, inside, 2, N_AXES, scale)
    if DYNAMIC:
        x3, u3, _s3 = _coordinate(x_ptr, point, inside, D, N_AXES, scale)
    total = tl.zeros((BLOCK, F), tl.float32)
    for corner in tl.static_range(2**D):
        a, wa = _end(x0, u0, corner % 2)
        b, wb = _end(x1, u1, corner // 2 % 2)
        c, wc = x2, 1.0
        if D == 3:
            c, wc = _end(x2, u2, corner // 4)
        weight = wa * wb * wc
        dense, mixed = _spatial(a, b, c, res, D)
        if STATIC:
            index = first + _entry(dense, mixed, entries, hashed).to(tl.int32)
            value = tl.load(
                static_ptr + index[:, None] * F + feature[None, :],
                mask=inside[:, None],
                other=0.0,
            )
            total += weight[:, None] * value.to(tl.float32)
        if DYNAMIC:
            for late in tl.static_range(2):
                d, wd = _end(x3, u3, late)
                volume = res * res * res if D == 3 else res * res
                entry = _entry(dense + d * volume, mixed ^ (d * _PRIME_T), entries_t, hashed_t)
                index_t = first_t + entry.to(tl.int32)
                value = tl.load(
                    dynamic_ptr + index_t[:, None] * F + feature[None, :],
                    mask=inside[:, None],
                    other=0.0,
                )
                total += (weight * wd)[:, None] * value.to(tl.float32)
    row = level * F + feature
    tl.store(out_ptr + row[None, :] * n + point[:, None], total, mask=inside[:, None])


@triton.jit
def table_gradient_kernel(
    x_ptr,
    grad_ptr,
    stride_n,
    stride_f,
    static_grad_ptr,
    dynamic_grad_ptr,
    scales_ptr,
    levels_ptr,
    n,
    N_AXES: tl.constexpr,
    D: tl.constexpr,
    STATIC: tl.constexpr,
    DYNAMIC: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds weight times incoming gradient to each corner's entry, in fp32; the order is free.

    STATIC and DYNAMIC: which tables need a gradient.
    """
    level = tl.program_id(1)
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = point < n
    feature = tl.arange(0, F)
    scale = tl.load(scales_ptr + level)
    res = tl.load(levels_ptr + level * 7).to(tl.uint32)
    entries, first, hashed = _level(levels_ptr, level, 0)
    entries_t, first_t, hashed_t = _level(levels_ptr, level, 1)
    x0, u0, _s0 = _coordinate(x_ptr, point, inside, 0, N_AXES, scale)
    x1, u1, _s1 = _coordinate(x_ptr, point, inside, 1, N_AXES, scale)
    x2, u2, x3, u3 = x1, u1, x1, u1
    if D == 3:
        x2, u2, _s2 = _coordinate(x_ptr, point, inside, 2, N_AXES, scale)
    if DYNAMIC:
        x3, u3, _s3 = _coordinate(x_ptr, point, inside, D, N_AXES, scale)
    row = level * F + feature
    grad = tl.load(
        grad_ptr + point[:, None] * stride_n + row[None, :] * stride_f,
        mask=inside[:, None],
        other=0.0,
    ).to(tl.float32)
    for corner in tl.static_range(2**D):
        a, wa = _end(x0, u0, corner % 2)
        b, wb = _end(x1, u1, corner // 2 % 2)
        c, wc = x2, 1.0
        if D == 3:
            c, wc = _end(x2, u2, corner // 4)
        weight = wa * wb * wc
        dense, mixed = _spatial(a, b, c, res, D)
        if STATIC:
            index = first + _entry(dense, mixed, entries, hashed).to(tl.int32)
            tl.atomic_add(
                static_grad_ptr + index[:, None] * F + feature[None, :],
                weight[:, None] * grad,
                mask=inside[:, None],
                sem="relaxed",
            )
        if DYNAMIC:
            for late in tl.static_range(2):
                d, wd = _end(x3, u3, late)
                volume = res * res * res if D == 3 else res * res
                entry = _entry(dense + d * volume, mixed ^ (d * _PRIME_T), entries_t, hashed_t)
                index_t = first_t + entry.to(tl.int32)
                tl.atomic_add(
                    dynamic_grad_ptr + index_t[:, None] * F + feature[None, :],
                    (weight * wd)[:, None] * grad,
                    mask=inside[:, None],
                    sem="relaxed",
                )


@triton.jit
def _projected(table_ptr, index, feature, grad, inside, F: tl.constexpr):
    """Dot product of a table entry and the incoming gradient, per point."""
    value = tl.load(
        table_ptr + index[:, None] * F + feature[None, :], mask=inside[:, None], other=0.0
    )
    return tl.sum(value.to(tl.float32) * grad, axis=1)


@triton.jit
def point_gradient_kernel(
    x_ptr,
    grad_ptr,
    stride_n,
    stride_f,
    static_ptr,
    dynamic_ptr,
    x_grad_ptr,
    scales_ptr,
    levels_ptr,
    n,
    n_levels,
    N_AXES: tl.constexpr,
    D: tl.constexpr,
    STATIC: tl.constexpr,
    DYNAMIC: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x_grad[point, axis], summed over the levels; the corners are read again."""
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = point < n
    feature = tl.arange(0, F)
    g0 = tl.zeros((BLOCK,), tl.float32)
    g1 = tl.zeros((BLOCK,), tl.float32)
    g2 = tl.zeros((BLOCK,), tl.float32)
    g3 = tl.zeros((BLOCK,), tl.float32)
    for level in range(n_levels):
        scale = tl.load(scales_ptr + level)
        res = tl.load(levels_ptr + level * 7).to(tl.uint32)
        entries, first, hashed = _level(levels_ptr, level, 0)
        entries_t, first_t, hashed_t = _level(levels_ptr, level, 1)
        x0, u0, s0 = _coordinate(x_ptr, point, inside, 0, N_AXES, scale)
        x1, u1, s1 = _coordinate(x_ptr, point, inside, 1, N_AXES, scale)
        x2, u2, s2, x3, u3, s3 = x1, u1, s1, x1, u1, s1
        if D == 3:
            x2, u2, s2 = _coordinate(x_ptr, point, inside, 2, N_AXES, scale)
        if DYNAMIC:
            x3, u3, s3 = _coordinate(x_ptr, point, inside, D, N_AXES, scale)
        row = level * F + feature
        grad = tl.load(
            grad_ptr + point[:, None] * stride_n + row[None, :] * stride_f,
            mask=inside[:, None],
            other=0.0,
        ).to(tl.float32)
        for corner in tl.static_range(2**D):
            a, wa = _end(x0, u0, corner % 2)
            b, wb = _end(x1, u1, corner // 2 % 2)
            c, wc = x2, 1.0
            if D == 3:
                c, wc = _end(x2, u2, corner // 4)
            dense, mixed = _spatial(a, b, c, res, D)
            along = tl.zeros((BLOCK,), tl.float32)
            if STATIC:
                index = first + _entry(dense, mixed, entries, hashed).to(tl.int32)
                along += _projected(static_ptr, index, feature, grad, inside, F)
            if DYNAMIC:
                volume = res * res * res if D == 3 else res * res
                entry = _entry(dense + x3 * volume, mixed ^ (x3 * _PRIME_T), entries_t, hashed_t)
                before = _projected(
                    dynamic_ptr, first_t + entry.to(tl.int32), feature, grad, inside, F
                )
                d = x3 + 1
                entry = _entry(dense + d * volume, mixed ^ (d * _PRIME_T), entries_t, hashed_t)
                after = _projected(
                    dynamic_ptr, first_t + entry.to(tl.int32), feature, grad, inside, F
                )
                along += before * (1.0 - u3) + after * u3
                g3 += wa * wb * wc * s3 * (after - before)
            sign0 = 1.0 if corner % 2 == 1 else -1.0
            sign1 = 1.0 if corner // 2 % 2 == 1 else -1.0
            g0 += sign0 * wb * wc * s0 * along
            g1 += sign1 * wa * wc * s1 * along
            if D == 3:
                sign2 = 1.0 if corner // 4 == 1 else -1.0
                g2 += sign2 * wa * wb * s2 * along
    base = x_grad_ptr + point * N_AXES
    tl.store(base, g0, mask=inside)
    tl.store(base + 1, g1, mask=inside)
    if D == 3:
        tl.store(base + 2, g2, mask=inside)
    if DYNAMIC:
        tl.store(base + D, g3, mask=inside)
