"""Rays of an image batch, checked and made flat.

Shapes: ``B H W`` the image batch, ``n_rays`` = B H W.
"""

from jaxtyping import Float
from torch import Tensor

from threestudio.models.renderers.volume_rendering import RayBatch
from threestudio.utils.device_copy import upload


def flat_rays(
    rays_o: Float[Tensor, "B H W 3"],
    rays_d: Float[Tensor, "B H W 3"],
    frame_times: Float[Tensor, "B"] | None,
) -> RayBatch:
    """Return the rays of a checked batch as one list, image after image, row after row."""
    image_size = rays_o.shape[1] * rays_o.shape[2]
    return RayBatch(rays_o.reshape(-1, 3), rays_d.reshape(-1, 3), image_size, frame_times)


def check_image_rays(
    rays_o: Float[Tensor, "B H W 3"],
    rays_d: Float[Tensor, "B H W 3"],
    light_positions: Float[Tensor, "B 3"],
    frame_times: Float[Tensor, "*times"] | None,
) -> Float[Tensor, "B"] | None:
    """Refuse shapes that would be broadcast to nonsense; give every image its time.

    Returns:
        The scene time of each image, None where none was given.

    Raises:
        ValueError: the shapes are not those of one batch of images.
    """
    batch_size = rays_o.shape[0]
    if rays_o.ndim != 4 or rays_o.shape[-1] != 3 or rays_d.shape != rays_o.shape:
        raise ValueError(
            f"rays_o has shape {tuple(rays_o.shape)} and rays_d {tuple(rays_d.shape)}; "
            "expected both (B, H, W, 3). Pass the batch's rays, not flattened ones."
        )
    if light_positions.shape != (batch_size, 3):
        raise ValueError(
            f"light_positions has shape {tuple(light_positions.shape)}; expected "
            f"({batch_size}, 3), one light per image."
        )
    if frame_times is None:
        return None
    if frame_times.numel() not in (1, batch_size):
        raise ValueError(
            f"frame_times has shape {tuple(frame_times.shape)}; expected {batch_size} values, "
            "one per image, or one for all."
        )
    times = upload(frame_times.reshape(-1), rays_o.device, rays_o.dtype)
    return times.expand(batch_size)
