"""Rasterising triangles with nvdiffrast, behind the names that extensions use.

Shapes: ``B`` images, ``Nv`` vertices, ``Nf`` triangles, ``C`` attributes of a vertex. Positions are
in clip space. ``rast`` is nvdiffrast's output; ``rast[..., 3] > 0`` is where a triangle is seen.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# By what configs call them: gl and cuda.
CONTEXTS = {
    name.removeprefix("Rasterize").removesuffix("Context").lower(): name
    for name in ("RasterizeGLContext", "RasterizeCudaContext")
}


class NVDiffRasterizerContext:
    """A context of nvdiffrast, which is imported when one is made.

    Args:
        context_type: "gl" (needs a display driver with EGL) or "cuda".
        device: CUDA device that the context belongs to.

    Raises:
        ValueError: another context type.
        ImportError: nvdiffrast is not installed; says where it can be.
    """

    def __init__(self, context_type: str, device: torch.device | str) -> None:
        if context_type not in CONTEXTS:
            raise ValueError(f"context_type is {context_type!r}; expected 'gl' or 'cuda'.")
        try:
            import nvdiffrast.torch as dr
        except ModuleNotFoundError as error:
            raise ImportError(
                "rasterising a mesh needs the package nvdiffrast and a CUDA GPU; install it there, "
                "or choose a volume renderer.",
                name="nvdiffrast",
            ) from error
        self.device = device
        self.ctx = getattr(dr, CONTEXTS[context_type])(device=device)
        self._dr = dr

    def vertex_transform(
        self, verts: Float[Tensor, "Nv 3"], mvp_mtx: Float[Tensor, "B 4 4"]
    ) -> Float[Tensor, "B Nv 4"]:
        """Return world positions in clip space, once for each matrix."""
        homogeneous = torch.nn.functional.pad(verts, (0, 1), value=1.0).to(mvp_mtx)
        return torch.einsum("bij,nj->bni", mvp_mtx, homogeneous)

    def rasterize(
        self,
        pos: Float[Tensor, "B Nv 4"],
        tri: Int[Tensor, "Nf 3"],
        resolution: int | tuple[int, int],
    ) -> tuple[Float[Tensor, "B H W 4"], Float[Tensor, "B H W 4"]]:
        """Return (rast, its image-space derivatives); one number makes a square image."""
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        return self._dr.rasterize(self.ctx, pos.float(), tri.int(), size, grad_db=True)

    def rasterize_one(
        self, pos: Float[Tensor, "Nv 4"], tri: Int[Tensor, "Nf 3"], resolution: Any
    ) -> tuple[Float[Tensor, "H W 4"], Float[Tensor, "H W 4"]]:
        """As `rasterize`, of one image."""
        rast, rast_db = self.rasterize(pos[None], tri, resolution)
        return rast[0], rast_db[0]

    def antialias(
        self,
        color: Float[Tensor, "B H W C"],
        rast: Float[Tensor, "B H W 4"],
        pos: Float[Tensor, "B Nv 4"],
        tri: Int[Tensor, "Nf 3"],
    ) -> Float[Tensor, "B H W C"]:
        """Blend across silhouettes, which is what gives positions a gradient."""
        return self._dr.antialias(color.float(), rast, pos.float(), tri.int())

    def interpolate(
        self,
        attr: Float[Tensor, "B Nv C"],
        rast: Float[Tensor, "B H W 4"],
        tri: Int[Tensor, "Nf 3"],
        rast_db: Float[Tensor, "B H W 4"] | None = None,
        diff_attrs: Any = None,
    ) -> tuple[Float[Tensor, "B H W C"], Any]:
        """Return vertex attributes at the pixels, and the derivatives of ``diff_attrs``."""
        return self._dr.interpolate(
            attr.float(), rast, tri.int(), rast_db=rast_db, diff_attrs=diff_attrs
        )

    def interpolate_one(
        self,
        attr: Float[Tensor, "Nv C"],
        rast: Float[Tensor, "B H W 4"],
        tri: Int[Tensor, "Nf 3"],
        rast_db: Float[Tensor, "B H W 4"] | None = None,
        diff_attrs: Any = None,
    ) -> tuple[Float[Tensor, "B H W C"], Any]:
        """As `interpolate`, of attributes that all images share."""
        return self.interpolate(attr[None], rast, tri, rast_db, diff_attrs)
