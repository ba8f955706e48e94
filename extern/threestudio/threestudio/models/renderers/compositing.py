"""From densities and colours at samples to images: the sums of `nerf-volume-renderer`.

Shapes: ``n_rays`` rays, ``Ns`` samples of all rays.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from threestudio.models.renderers.ray_samplers import DynamicSampler
from threestudio.models.renderers.volume_rendering import RaySamples


def composite_samples(
    samples: RaySamples,
    result: dict[str, Tensor],
    n_rays: int,
    sampler: DynamicSampler,
    with_normal: bool,
    with_displacement: bool,
) -> dict[str, Tensor]:
    """Sum up the samples of each ray: colour, opacity and depth together in one pass.

    Args:
        samples: where they lie.
        result: density and rgb at the samples, normal and displacement where they are asked for;
            receives ``weights`` ``[Ns]``.
        n_rays: number of rays.
        sampler: whose weights and sums are taken.
        with_normal: add ``comp_normal``, (n + 1) / 2 * opacity.
        with_displacement: add ``deformation``, the sum of w displacement.

    Returns:
        comp_rgb_fg, opacity, depth, z_variance ``[n_rays, C]`` and what was asked for.
    """
    weights = sampler.render_weights(result["density"][:, 0], samples, n_rays)
    result["weights"] = weights
    t_mids, rays = samples.t_mids, samples.ray_indices
    columns = [result["rgb"], torch.ones_like(t_mids)[:, None], t_mids[:, None]]
    if with_displacement:
        columns.append(result["displacement"])
    summed = sampler.accumulate_along_rays(weights, torch.cat(columns, dim=-1), rays, n_rays)
    channels = result["rgb"].shape[-1]
    opacity, depth = summed[:, channels : channels + 1], summed[:, channels + 1 : channels + 2]
    output = {
        "comp_rgb_fg": summed[:, :channels],
        "opacity": opacity,
        "depth": depth,
        "z_variance": _z_variance(weights, t_mids, opacity, depth, rays, sampler),
    }
    if with_displacement:
        output["deformation"] = summed[:, channels + 2 :]
    if with_normal:
        normal = sampler.accumulate_along_rays(weights, result["normal"], rays, n_rays)
        output["comp_normal"] = (F.normalize(normal, dim=-1) + 1.0) / 2.0 * opacity
    return output


def _z_variance(
    weights: Float[Tensor, "Ns"],
    t_mids: Float[Tensor, "Ns"],
    opacity: Float[Tensor, "n_rays 1"],
    depth: Float[Tensor, "n_rays 1"],
    ray_indices: Int[Tensor, "Ns"],
    sampler: DynamicSampler,
) -> Float[Tensor, "n_rays 1"]:
    """Sum of w' (t - sum w' t)^2 with w' = w / max(opacity, 1e-5); 0 where opacity <= 0.5."""
    total = opacity.clamp(min=1e-5)
    mean = depth / total
    deviation = t_mids[:, None] - mean.index_select(0, ray_indices)
    variance = sampler.accumulate_along_rays(
        weights, deviation.square(), ray_indices, opacity.shape[0]
    )
    return torch.where(opacity > 0.5, variance / total, 0.0)


def per_sample_outputs(
    samples: RaySamples, result: dict[str, Tensor], is_static: bool
) -> dict[str, Tensor]:
    """What training gets for each sample; of a list of fixed length also ``is_padding [Ns, 1]``."""
    lengths = samples.t_ends - samples.t_starts
    output = {key: value for key, value in result.items() if key not in ("rgb", "weights")}
    output.update(
        weights=result["weights"][:, None],
        t_points=samples.t_mids[:, None],
        t_intervals=lengths[:, None],
        ray_indices=samples.ray_indices,
    )
    if is_static:
        output["is_padding"] = samples.is_padding[:, None]
    return output
