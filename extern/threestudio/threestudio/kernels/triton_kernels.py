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
def _cells(
    x_ptr,
    point,
    inside,
    scale,
    N_AXES: tl.constexpr,
    D: tl.constexpr,
    DYNAMIC: tl.constexpr,
):
    """`_coordinate` of x, y, z and time; an axis that the grids lack repeats y."""
    x0, u0, s0 = _coordinate(x_ptr, point, inside, 0, N_AXES, scale)
    x1, u1, s1 = _coordinate(x_ptr, point, inside, 1, N_AXES, scale)
    x2, u2, s2, x3, u3, s3 = x1, u1, s1, x1, u1, s1
    if D == 3:
        x2, u2, s2 = _coordinate(x_ptr, point, inside, 2, N_AXES, scale)
    if DYNAMIC:
        x3, u3, s3 = _coordinate(x_ptr, point, inside, D, N_AXES, scale)
    return x0, u0, s0, x1, u1, s1, x2, u2, s2, x3, u3, s3


@triton.jit
def _level(levels_ptr, level):
    """Resolution; entries, first entry and whether it is hashed, of the static and the dynamic."""
    base = levels_ptr + level * 7
    resolution, entries = tl.load(base).to(tl.uint32), tl.load(base + 1).to(tl.uint32)
    entries_t = tl.load(base + 4).to(tl.uint32)
    static = (entries, tl.load(base + 2), tl.load(base + 3))
    return resolution, static, (entries_t, tl.load(base + 5), tl.load(base + 6))


@triton.jit
def _corner(x0, u0, x1, u1, x2, u2, resolution, corner: tl.constexpr, D: tl.constexpr):
    """Weights along each axis of a spatial corner, and its vertex's dense and hashed number,
    before these are brought into the level's range."""
    a, wa = _end(x0, u0, corner % 2)
    b, wb = _end(x1, u1, corner // 2 % 2)
    dense = a + b * resolution
    mixed = a ^ (b * _PRIME_Y)
    wc = 1.0
    if D == 3:
        c, wc = _end(x2, u2, corner // 4)
        dense += c * (resolution * resolution)
        mixed ^= c * _PRIME_Z
    return wa, wb, wc, dense, mixed


@triton.jit
def _at_time(dense, mixed, time, resolution, D: tl.constexpr):
    """The numbers of a spatial vertex, with the time as the last axis."""
    volume = resolution * resolution * resolution if D == 3 else resolution * resolution
    return dense + time * volume, mixed ^ (time * _PRIME_T)


@triton.jit
def _entries(dense, mixed, place, feature, F: tl.constexpr):
    """Offsets [block, F] of a vertex's entry. A hashed level has 2^k entries, whose remainder is a
    mask."""
    entries, first, hashed = place
    if hashed != 0:
        index = mixed & (entries - 1)
    else:
        index = dense % entries
    return (first + index.to(tl.int32))[:, None] * F + feature[None, :]


@triton.jit
def _values(table_ptr, offsets, inside):
    return tl.load(table_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _incoming(grad_ptr, stride_n, stride_f, point, row, inside):
    """Gradient of a level's features, of any strides."""
    offsets = point[:, None] * stride_n + row[None, :] * stride_f
    return tl.load(grad_ptr + offsets, mask=inside[:, None], other=0.0).to(tl.float32)


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
    res, static, dynamic = _level(levels_ptr, level)
    x0, u0, _s0, x1, u1, _s1, x2, u2, _s2, x3, u3, _s3 = _cells(
        x_ptr, point, inside, scale, N_AXES, D, DYNAMIC
    )
    total = tl.zeros((BLOCK, F), tl.float32)
    for corner in tl.static_range(2**D):
        wa, wb, wc, dense, mixed = _corner(x0, u0, x1, u1, x2, u2, res, corner, D)
        weight = wa * wb * wc
        if STATIC:
            offsets = _entries(dense, mixed, static, feature, F)
            total += weight[:, None] * _values(static_ptr, offsets, inside)
        if DYNAMIC:
            for late in tl.static_range(2):
                time, wd = _end(x3, u3, late)
                dense_t, mixed_t = _at_time(dense, mixed, time, res, D)
                offsets = _entries(dense_t, mixed_t, dynamic, feature, F)
                total += (weight * wd)[:, None] * _values(dynamic_ptr, offsets, inside)
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
    res, static, dynamic = _level(levels_ptr, level)
    x0, u0, _s0, x1, u1, _s1, x2, u2, _s2, x3, u3, _s3 = _cells(
        x_ptr, point, inside, scale, N_AXES, D, DYNAMIC
    )
    grad = _incoming(grad_ptr, stride_n, stride_f, point, level * F + feature, inside)
    for corner in tl.static_range(2**D):
        wa, wb, wc, dense, mixed = _corner(x0, u0, x1, u1, x2, u2, res, corner, D)
        share = (wa * wb * wc)[:, None] * grad
        if STATIC:
            target = static_grad_ptr + _entries(dense, mixed, static, feature, F)
            tl.atomic_add(target, share, mask=inside[:, None], sem="relaxed")
        if DYNAMIC:
            for late in tl.static_range(2):
                time, wd = _end(x3, u3, late)
                dense_t, mixed_t = _at_time(dense, mixed, time, res, D)
                target = dynamic_grad_ptr + _entries(dense_t, mixed_t, dynamic, feature, F)
                tl.atomic_add(target, wd[:, None] * share, mask=inside[:, None], sem="relaxed")


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
        res, static, dynamic = _level(levels_ptr, level)
        x0, u0, s0, x1, u1, s1, x2, u2, s2, x3, u3, s3 = _cells(
            x_ptr, point, inside, scale, N_AXES, D, DYNAMIC
        )
        grad = _incoming(grad_ptr, stride_n, stride_f, point, level * F + feature, inside)
        for corner in tl.static_range(2**D):
            wa, wb, wc, dense, mixed = _corner(x0, u0, x1, u1, x2, u2, res, corner, D)
            # The change of the loss with this corner's weight.
            along = tl.zeros((BLOCK,), tl.float32)
            if STATIC:
                offsets = _entries(dense, mixed, static, feature, F)
                along += tl.sum(_values(static_ptr, offsets, inside) * grad, axis=1)
            if DYNAMIC:
                for late in tl.static_range(2):
                    time, wd = _end(x3, u3, late)
                    dense_t, mixed_t = _at_time(dense, mixed, time, res, D)
                    offsets = _entries(dense_t, mixed_t, dynamic, feature, F)
                    read = tl.sum(_values(dynamic_ptr, offsets, inside) * grad, axis=1)
                    along += wd * read
                    g3 += (2.0 * late - 1.0) * wa * wb * wc * s3 * read
            g0 += (2.0 * (corner % 2) - 1.0) * wb * wc * s0 * along
            g1 += (2.0 * (corner // 2 % 2) - 1.0) * wa * wc * s1 * along
            if D == 3:
                g2 += (2.0 * (corner // 4) - 1.0) * wa * wb * s2 * along
    base = x_grad_ptr + point * N_AXES
    tl.store(base, g0, mask=inside)
    tl.store(base + 1, g1, mask=inside)
    if D == 3:
        tl.store(base + 2, g2, mask=inside)
    if DYNAMIC:
        tl.store(base + D, g3, mask=inside)
