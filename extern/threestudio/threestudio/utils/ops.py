"""Tensor operations of the contract: activations, rays, projection matrices, small formulas.

Shapes: ``B`` cameras, ``H W`` image rows and columns, ``N`` rays or points. Cameras are
camera-to-world matrices in the OpenGL convention (x right, y up, looking down -z; world z up).
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function

__all__ = [
    "SpecifyGradient",
    "binary_cross_entropy",
    "chunk_batch",
    "convert_pose",
    "dot",
    "get_activation",
    "get_cam_info_gaussian",
    "get_fov_gaussian",
    "get_full_projection_matrix",
    "get_mvp_matrix",
    "get_projection_matrix",
    "get_projection_matrix_gaussian",
    "get_ray_directions",
    "get_rays",
    "lin2srgb",
    "mask_ray_directions",
    "perpendicular_component",
    "reflect",
    "scale_tensor",
    "shifted_cosine_decay",
    "shifted_expotional_decay",
    "tet_sdf_diff",
    "trunc_exp",
    "validate_empty_rays",
]

TRUNC_EXP_MAX = 15.0  # above this the backward pass of trunc_exp stops growing


def dot(x: Float[Tensor, "*batch d"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
    """Inner product over the last dimension, which stays with size one."""
    return torch.sum(x * y, -1, keepdim=True)


def reflect(
    x: Float[Tensor, "*batch d"], n: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    """Mirror ``x`` about the unit vector ``n``: 2 (x . n) n - x."""
    return 2 * dot(x, n) * n - x


def scale_tensor(
    dat: Float[Tensor, "*batch d"],
    inp_scale: tuple[float, float] | Float[Tensor, "2 d"] | None,
    tgt_scale: tuple[float, float] | Float[Tensor, "2 d"] | None,
) -> Float[Tensor, "*batch d"]:
    """Map values affinely from one range to another.

    Args:
        dat: values in ``inp_scale``; values outside are extrapolated.
        inp_scale: (low, high) as numbers or per-dimension rows; None means (0, 1).
        tgt_scale: the range to map to, in the same form.
    """
    low_in, high_in = (0.0, 1.0) if inp_scale is None else inp_scale
    low_out, high_out = (0.0, 1.0) if tgt_scale is None else tgt_scale
    return (dat - low_in) / (high_in - low_in) * (high_out - low_out) + low_out


class _TruncExp(Function):
    """exp whose gradient is capped, so that one huge density cannot destroy a step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.float()
        ctx.save_for_backward(x)
        return torch.exp(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.exp(x.clamp(max=TRUNC_EXP_MAX))


class SpecifyGradient(Function):
    """A scalar (value one) whose gradient is the given tensor times the incoming scalar gradient.

    ``SpecifyGradient.apply(latents, grad)`` lets a score-distillation loss push ``grad`` into
    ``latents`` without a graph through the diffusion model.
    """

    @staticmethod
    def forward(ctx: Any, input_tensor: Tensor, gt_grad: Tensor) -> Tensor:
        ctx.save_for_backward(gt_grad)
        return torch.ones([1], device=input_tensor.device, dtype=input_tensor.dtype)

    @staticmethod
    def backward(ctx: Any, grad_scale: Tensor) -> tuple[Tensor, None]:
        (gt_grad,) = ctx.saved_tensors
        return gt_grad * grad_scale, None


def trunc_exp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """e^x in float32; the gradient is g e^min(x, 15)."""
    return _TruncExp.apply(x)


def lin2srgb(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Linear light to sRGB, clamped to [0, 1] (IEC 61966-2-1)."""
    # The power has an infinite slope at zero; the floor keeps the unused branch's gradient finite.
    curve = torch.pow(x.clamp(min=0.0031308), 1.0 / 2.4) * 1.055 - 0.055
    return torch.where(x > 0.0031308, curve, 12.92 * x).clamp(0.0, 1.0)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "lin2srgb": lin2srgb,
    "exp": torch.exp,
    "shifted_exp": lambda x: torch.exp(x - 1.0),
    "trunc_exp": trunc_exp,
    "shifted_trunc_exp": lambda x: trunc_exp(x - 1.0),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "shifted_softplus": lambda x: F.softplus(x - 1.0),
    "scale_-11_01": lambda x: x * 0.5 + 0.5,
}


def get_activation(name: str | None) -> Callable[[Tensor], Tensor]:
    """Return the activation of that name (case does not matter); None is the identity.

    Raises:
        ValueError: the name is neither one of ours nor a function of torch.nn.functional.
    """
    if name is None:
        return _ACTIVATIONS["none"]
    key = str(name).lower()
    if key in _ACTIVATIONS:
        return _ACTIVATIONS[key]
    function = getattr(F, key, None)
    if not callable(function):
        raise ValueError(
            f"Unknown activation function {name!r}; expected one of "
            f"{', '.join(sorted(_ACTIVATIONS))} or a function of torch.nn.functional."
        )
    return function


def chunk_batch(func: Callable[..., Any], chunk_size: int, *args: Any, **kwargs: Any) -> Any:
    """Call ``func`` on slices of its tensor arguments and concatenate the results.

    Args:
        func: returns a tensor, or a tuple, list or dict of tensors (dict values may be None).
        chunk_size: rows per call; zero or less calls once with everything.
        args, kwargs: tensors are cut along dim 0 and must agree in length; the rest is handed on.

    Without gradients the pieces are detached. An empty batch calls ``func`` once with no rows.
    """
    if chunk_size <= 0:
        return func(*args, **kwargs)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if not tensors:
        raise ValueError("chunk_batch got no tensor argument; expected one to cut along dim 0.")
    n_rows = tensors[0].shape[0]

    def cut(value: Any, start: int) -> Any:
        return value[start : start + chunk_size] if isinstance(value, Tensor) else value

    results = []
    for start in range(0, max(1, n_rows), chunk_size):
        results.append(
            func(*(cut(a, start) for a in args), **{k: cut(v, start) for k, v in kwargs.items()})
        )
    return _join_chunks(results)


def _join_chunks(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return _concatenate(results)
    if isinstance(first, (tuple, list)):
        return type(first)(_concatenate(list(column)) for column in zip(*results, strict=True))
    if isinstance(first, dict):
        columns: dict[str, list[Tensor | None]] = defaultdict(list)
        for result in results:
            for key, value in result.items():
                columns[key].append(value)
        return {key: _concatenate(column) for key, column in columns.items()}
    raise TypeError(
        f"chunk_batch cannot join results of type {type(first).__name__}; "
        "expected a tensor, or a tuple, list or dict of tensors."
    )


def _concatenate(pieces: list[Tensor | None]) -> Tensor | None:
    if any(piece is None for piece in pieces):
        return None
    if not torch.is_grad_enabled():
        pieces = [piece.detach() for piece in pieces]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=0)


def get_ray_directions(
    H: int,
    W: int,
    focal: float | tuple[float, float],
    principal: tuple[float, float] | None = None,
    use_pixel_centers: bool = True,
) -> Float[Tensor, "H W 3"]:
    """Camera-frame ray directions of an image, not normalised: ((i-cx)/fx, -(j-cy)/fy, -1).

    Args:
        focal: focal length in pixels, or (fx, fy); a pair needs ``principal``.
        principal: (cx, cy) in pixels; the image centre when ``focal`` is one number.
        use_pixel_centers: add half a pixel to the indices.

    Raises:
        ValueError: a pair of focal lengths without a principal point.
    """
    if isinstance(focal, (int, float)):
        fx = fy = float(focal)
        cx, cy = W / 2, H / 2
    elif principal is None:
        raise ValueError(
            f"get_ray_directions got focal={tuple(focal)} without a principal point; "
            "pass principal=(cx, cy) in pixels, or one focal length for a centred camera."
        )
    else:
        fx, fy = focal
        cx, cy = principal
    offset = 0.5 if use_pixel_centers else 0.0
    columns = torch.arange(W, dtype=torch.float32) + offset
    rows = torch.arange(H, dtype=torch.float32) + offset
    j, i = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([(i - cx) / fx, -(j - cy) / fy, -torch.ones_like(i)], -1)


def mask_ray_directions(
    H: int,
    W: int,
    s_H: int,
    s_W: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "HW"]:
    """Choose s_H * s_W of H * W pixels, half of them in a centred window (Efficient-DreamFusion).

    The window has side 1/sqrt(2) of the image. Returned flat, row-major, exactly s_H * s_W true.

    Random: drawn from ``generator`` on the CPU (the global one when None).
    """
    n_wanted = s_H * s_W
    if n_wanted > H * W:
        raise ValueError(
            f"mask_ray_directions was asked for {s_H} x {s_W} rays of an image of {H} x {W}; "
            "the sample must not exceed the image."
        )
    window = torch.zeros(H, W, dtype=torch.bool)
    half_h, half_w = round(H * (1 - 0.5**0.5) / 2), round(W * (1 - 0.5**0.5) / 2)
    window[half_h : H - half_h, half_w : W - half_w] = True
    inside, outside = window.flatten().nonzero()[:, 0], (~window).flatten().nonzero()[:, 0]
    n_outside = min(n_wanted // 2, outside.numel())
    n_inside = min(n_wanted - n_outside, inside.numel())
    n_outside = n_wanted - n_inside
    mask = torch.zeros(H * W, dtype=torch.bool)
    for pixels, count in ((inside, n_inside), (outside, n_outside)):
        mask[pixels[torch.randperm(pixels.numel(), generator=generator)[:count]]] = True
    return mask if device is None else mask.to(device)


def get_rays(
    directions: Float[Tensor, "*rays 3"],
    c2w: Float[Tensor, "*cameras 4 4"],
    keepdim: bool = False,
    noise_scale: float = 0.0,
    normalize: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "*out 3"], Float[Tensor, "*out 3"]]:
    """Rays in the world: origins and directions.

    Args:
        directions: camera-frame directions ``[N, 3]`` (with ``[B, 4, 4]``: one camera per ray, with
            ``[4, 4]``: the same for all), ``[H, W, 3]`` or ``[B, H, W, 3]``.
        c2w: camera-to-world matrices; one is shared by all, several pair with the first dimension
            of ``[B, H, W, 3]`` or multiply ``[H, W, 3]``.
        keepdim: keep the image dimensions instead of flattening to ``[N, 3]``; one image of one
            camera stays ``[H, W, 3]``.
        noise_scale: standard deviation of Gaussian noise (world units) on origins and directions.
        normalize: make the directions unit length.

    Random: the noise, from ``generator`` (on the generator's device; the global one when None).
    """
    if directions.shape[-1] != 3:
        raise ValueError(
            f"directions has shape {tuple(directions.shape)}; expected (..., 3). "
            "Pass directions of get_ray_directions, not pixels."
        )
    if c2w.ndim not in (2, 3) or directions.ndim not in (2, 3, 4):
        raise ValueError(
            f"get_rays got directions {tuple(directions.shape)} and c2w {tuple(c2w.shape)}; "
            "expected [N,3], [H,W,3] or [B,H,W,3] with [4,4] or [B,4,4]."
        )
    directions_ndim = directions.ndim
    if directions_ndim == 2:
        rotation, origin = c2w[..., :3, :3], c2w[..., :3, 3]
    else:
        matrices = c2w if c2w.ndim == 3 else c2w[None]
        rotation, origin = matrices[:, None, None, :3, :3], matrices[:, None, None, :3, 3]
        directions = directions if directions.ndim == 4 else directions[None]
    rays_d = torch.einsum("...ij,...j->...i", rotation, directions)
    if directions_ndim == 3 and c2w.ndim == 2:
        rays_d, origin = rays_d[0], origin[0]  # one image of one camera has no batch axis
    rays_o = origin.expand(rays_d.shape)

    if noise_scale > 0:
        # One draw moves both ends, as upstream: the camera trembles, it does not blur.
        where = "cpu" if generator is None else generator.device
        noise = torch.randn(rays_d.shape, generator=generator, device=where).to(rays_d)
        rays_o, rays_d = rays_o + noise * noise_scale, rays_d + noise * noise_scale
    if normalize:
        rays_d = F.normalize(rays_d, dim=-1)
    if not keepdim:
        rays_o, rays_d = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
    return rays_o, rays_d


def get_projection_matrix(
    fovy: Float[Tensor, "B"], aspect_wh: float, near: float, far: float
) -> Float[Tensor, "B 4 4"]:
    """OpenGL perspective matrices with a negated y row (row 0 of an image is its top).

    Args:
        fovy: vertical field of view in radians.
        aspect_wh: width over height.
        near, far: clip planes in world units.
    """
    cot = 1.0 / torch.tan(fovy / 2.0)
    proj_mtx = torch.zeros(fovy.shape[0], 4, 4, dtype=torch.float32, device=fovy.device)
    proj_mtx[:, 0, 0] = cot / aspect_wh
    proj_mtx[:, 1, 1] = -cot
    proj_mtx[:, 2, 2] = -(far + near) / (far - near)
    proj_mtx[:, 2, 3] = -2.0 * far * near / (far - near)
    proj_mtx[:, 3, 2] = -1.0
    return proj_mtx


def _rigid_inverse(c2w: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B 4 4"]:
    rotation = c2w[:, :3, :3].transpose(1, 2)
    w2c = torch.zeros_like(c2w)
    w2c[:, :3, :3] = rotation
    w2c[:, :3, 3:] = -rotation @ c2w[:, :3, 3:]
    w2c[:, 3, 3] = 1.0
    return w2c


def get_mvp_matrix(
    c2w: Float[Tensor, "B 4 4"], proj_mtx: Float[Tensor, "B 4 4"]
) -> Float[Tensor, "B 4 4"]:
    """World to clip space: projection times the inverse of a rigid camera-to-world matrix."""
    return proj_mtx @ _rigid_inverse(c2w)


def get_full_projection_matrix(
    c2w: Float[Tensor, "B 4 4"], proj_mtx: Float[Tensor, "B 4 4"]
) -> Float[Tensor, "B 4 4"]:
    """Row-vector form of the transform of :func:`get_mvp_matrix`: w2c^T proj^T per camera."""
    return get_mvp_matrix(c2w, proj_mtx).transpose(1, 2)


def convert_pose(C2W: Float[Tensor, "4 4"]) -> Float[Tensor, "4 4"]:
    """OpenGL camera-to-world to OpenCV's (y down, looking along +z): both axes change sign."""
    return C2W * C2W.new_tensor([1.0, -1.0, -1.0, 1.0])


def get_projection_matrix_gaussian(
    znear: float,
    zfar: float,
    fovX: float | Tensor,
    fovY: float | Tensor,
    device: torch.device | str | None = None,
) -> Float[Tensor, "4 4"]:
    """Perspective matrix of Gaussian splatting: z into [0, 1], looking along +z; radians."""
    P = torch.zeros(4, 4, device=device)
    P[0, 0] = 1.0 / math.tan(float(fovX) / 2)
    P[1, 1] = 1.0 / math.tan(float(fovY) / 2)
    P[2, 2] = zfar / (zfar - znear)
    P[2, 3] = -(zfar * znear) / (zfar - znear)
    P[3, 2] = 1.0
    return P


def get_fov_gaussian(P: Float[Tensor, "4 4"]) -> tuple[float, float]:
    """(fovX, fovY) in radians of a matrix of :func:`get_projection_matrix_gaussian`."""
    return 2 * math.atan(1.0 / float(P[0, 0])), 2 * math.atan(1.0 / float(P[1, 1]))


def get_cam_info_gaussian(
    c2w: Float[Tensor, "4 4"],
    fovx: float | Tensor,
    fovy: float | Tensor,
    znear: float,
    zfar: float,
) -> tuple[Float[Tensor, "4 4"], Float[Tensor, "4 4"], Float[Tensor, "3"]]:
    """Camera of Gaussian splatting, on the device of ``c2w``.

    Returns:
        world_view_transform: transposed world-to-camera matrix (row vectors), OpenCV axes.
        full_proj_transform: transposed world-to-clip matrix.
        camera_center: camera position in the world.
    """
    world_view = torch.inverse(convert_pose(c2w).float()).T
    projection = get_projection_matrix_gaussian(znear, zfar, fovx, fovy, device=c2w.device).T
    return world_view, world_view @ projection, c2w[:3, 3].float()


def binary_cross_entropy(
    input: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Mean of -(t log i + (1 - t) log(1 - i)).

    Not clamped: callers keep ``input`` away from 0 and 1 (the losses use [1e-3, 1 - 1e-3]).
    Unlike torch's it differentiates with respect to ``target`` too, for the opacity entropy.
    """
    return -(target * torch.log(input) + (1 - target) * torch.log(1 - input)).mean()


def perpendicular_component(
    x: Float[Tensor, "B C H W"], y: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B C H W"]:
    """The part of x that is perpendicular to y, over channels and pixels (Perp-Neg).

    The squared norm of y is kept away from zero by 1e-6.
    """
    dims = list(range(1, x.ndim))
    coefficient = (x * y).sum(dims, keepdim=True) / (y * y).sum(dims, keepdim=True).clamp(min=1e-6)
    return x - coefficient * y


def shifted_expotional_decay(a: float, b: float, c: float, r: float | Tensor) -> Tensor:
    """a e^(-b r) + c (upstream's spelling; the Perp-Neg weight of a view)."""
    return a * torch.exp(-b * torch.as_tensor(r)) + c


def shifted_cosine_decay(a: float, b: float, c: float, r: float | Tensor) -> Tensor:
    """a cos(b r + c) + a."""
    return a * torch.cos(b * torch.as_tensor(r) + c) + a


def validate_empty_rays(
    ray_indices: Int[Tensor, "n_samples"],
    t_start: Float[Tensor, "n_samples"],
    t_end: Float[Tensor, "n_samples"],
) -> tuple[Int[Tensor, "n_kept"], Float[Tensor, "n_kept"], Float[Tensor, "n_kept"]]:
    """Replace an empty set of samples by one of zero length on ray 0.

    Its optical depth is exactly zero, so images and gradients stay those of an empty scene while
    networks that cannot take zero rows still run.
    """
    if ray_indices.nelement() > 0:
        return ray_indices, t_start, t_end
    return ray_indices.new_zeros(1), t_start.new_zeros(1), t_end.new_zeros(1)


def tet_sdf_diff(
    vert_sdf: Float[Tensor, "n_vertices 1"], tet_edges: Int[Tensor, "n_edges 2"]
) -> Float[Tensor, ""]:
    """Cross entropy across the grid edges whose ends differ in sign (DMTet's regulariser)."""
    edge_sdf = vert_sdf[:, 0][tet_edges.reshape(-1)].reshape(-1, 2)
    edge_sdf = edge_sdf[torch.sign(edge_sdf[:, 0]) != torch.sign(edge_sdf[:, 1])]
    if edge_sdf.shape[0] == 0:
        return vert_sdf.sum() * 0.0  # nothing crosses: a zero that still has a gradient
    first, second = edge_sdf[:, 0], edge_sdf[:, 1]
    return F.binary_cross_entropy_with_logits(
        first, (second > 0).float()
    ) + F.binary_cross_entropy_with_logits(second, (first > 0).float())
