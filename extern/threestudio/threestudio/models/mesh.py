"""Triangle meshes.

Shapes: ``Nv`` vertices, ``Nf`` faces, ``Ne`` edges.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

import threestudio
from threestudio.models.uv_atlas import TriangleAtlas, plan_atlas
from threestudio.utils.ops import dot


class Mesh:
    """Vertices and triangles, with derived quantities computed on first use and kept.

    Args:
        v_pos: vertex positions in world units.
        t_pos_idx: vertex indices of each triangle, counter-clockwise seen from outside.
        **kwargs: extras, kept under their names in ``extras``.
    """

    def __init__(
        self, v_pos: Float[Tensor, "Nv 3"], t_pos_idx: Int[Tensor, "Nf 3"], **kwargs: Any
    ) -> None:
        self.v_pos = v_pos
        self.t_pos_idx = t_pos_idx
        self._v_nrm: Tensor | None = None
        self._v_rgb: Tensor | None = None
        self._edges: Tensor | None = None
        self._atlas: TriangleAtlas | None = None
        self.extras: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.add_extra(name, value)

    def add_extra(self, name: str, value: Any) -> None:
        """Attach something to the mesh under a name."""
        self.extras[name] = value

    @property
    def requires_grad(self) -> bool:
        """Whether the vertex positions are being optimised."""
        return self.v_pos.requires_grad

    @property
    def v_nrm(self) -> Float[Tensor, "Nv 3"]:
        """Unit vertex normals, outward: area-weighted means of the adjacent faces'.

        A vertex without any area gets +z.
        """
        if self._v_nrm is None:
            self._v_nrm = self._compute_vertex_normal()
        return self._v_nrm

    @property
    def v_rgb(self) -> Float[Tensor, "Nv 3"] | None:
        """Vertex colours, or None until `set_vertex_color`."""
        return self._v_rgb

    @property
    def edges(self) -> Int[Tensor, "Ne 2"]:
        """Every undirected edge once, smaller index first."""
        if self._edges is None:
            self._edges = self._compute_edges()
        return self._edges

    @property
    def v_tex(self) -> Float[Tensor, "Nt 2"]:
        """Texture coordinates in [0, 1], v downwards; made by `unwrap_uv` unless it was called."""
        if self._atlas is None:
            self.unwrap_uv()
        return self._atlas.corners().reshape(-1, 2).to(self.v_pos)

    @property
    def t_tex_idx(self) -> Int[Tensor, "Nf 3"]:
        """Index in ``v_tex`` of each corner; no corners share one."""
        return torch.arange(3 * len(self.t_pos_idx)).view(-1, 3).to(self.t_pos_idx)

    @property
    def v_tng(self) -> Tensor:
        """Refuse: where every triangle is a chart of its own, a vertex has no tangent."""
        raise NotImplementedError(
            "vertex tangents need charts of many triangles, which xatlas would make and this "
            "atlas of single triangles does not; use normals (v_nrm)."
        )

    def set_vertex_color(self, v_rgb: Float[Tensor, "Nv 3"]) -> None:
        """Give every vertex a colour in [0, 1]."""
        if v_rgb.shape[0] != self.v_pos.shape[0]:
            raise ValueError(
                f"v_rgb has {v_rgb.shape[0]} rows; expected one per vertex ({self.v_pos.shape[0]})."
            )
        self._v_rgb = v_rgb

    def unwrap_uv(
        self,
        xatlas_chart_options: dict | None = None,
        xatlas_pack_options: dict | None = None,
        texture_size: int = 1024,
    ) -> TriangleAtlas:
        """Lay the triangles out in a texture; ``v_tex`` and ``t_tex_idx`` are of the last call.

        Args:
            xatlas_chart_options, xatlas_pack_options: of the original's unwrapping; not used.
            texture_size: texels a side at most; more where the triangles need them.
        """
        self._atlas = plan_atlas(len(self.t_pos_idx), texture_size)
        return self._atlas

    def remove_outlier(self, outlier_n_faces_threshold: int | float) -> "Mesh":
        """Return the mesh without connected parts that have too few faces.

        Args:
            outlier_n_faces_threshold: faces a part needs; an int is a count, a float a share of all
                faces. The largest part always stays. A mesh under optimisation stays as it is.
        """
        if self.requires_grad:
            threestudio.debug("The mesh is being optimised; its outliers are kept.")
            return self
        n_faces = self.t_pos_idx.shape[0]
        if n_faces == 0:
            return self
        threshold = outlier_n_faces_threshold
        if isinstance(threshold, float):
            threshold = int(n_faces * threshold)
        part_of_face = self._connected_parts()[self.t_pos_idx[:, 0]]
        faces_of_part = torch.bincount(part_of_face, minlength=self.v_pos.shape[0])
        keep_part = faces_of_part >= min(int(threshold), int(faces_of_part.max()))
        faces = self.t_pos_idx[keep_part[part_of_face]]
        used, inverse = torch.unique(faces, return_inverse=True)
        mesh = Mesh(self.v_pos[used], inverse.view(-1, 3).to(self.t_pos_idx.dtype), **self.extras)
        if self._v_rgb is not None:
            mesh.set_vertex_color(self._v_rgb[used])
        return mesh

    def _connected_parts(self) -> Int[Tensor, "Nv"]:
        """Smallest vertex index of each vertex's part: label propagation with pointer jumping."""
        labels = torch.arange(self.v_pos.shape[0], device=self.v_pos.device)
        first, second = self.edges.long().unbind(-1)
        while True:
            low = torch.minimum(labels[first], labels[second])
            hooked = labels.scatter_reduce(0, labels[first], low, "amin")
            hooked = hooked.scatter_reduce(0, labels[second], low, "amin")
            hooked = hooked[hooked]
            if torch.equal(hooked, labels):
                return labels
            labels = hooked

    def _compute_vertex_normal(self) -> Float[Tensor, "Nv 3"]:
        corners = self.v_pos[self.t_pos_idx.long()]
        face_normals = torch.linalg.cross(
            corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], dim=-1
        )
        v_nrm = torch.zeros_like(self.v_pos)
        for corner in range(3):
            v_nrm = v_nrm.index_add(0, self.t_pos_idx[:, corner].long(), face_normals)
        up = torch.tensor([0.0, 0.0, 1.0]).to(v_nrm)
        v_nrm = torch.where(dot(v_nrm, v_nrm) > 1e-20, v_nrm, up)
        return F.normalize(v_nrm, dim=-1)

    def _compute_edges(self) -> Int[Tensor, "Ne 2"]:
        faces = self.t_pos_idx
        pairs = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        return torch.unique(pairs.sort(dim=-1).values, dim=0)

    def normal_consistency(self) -> Float[Tensor, ""]:
        """Mean over edges of 1 - cos of the angle between the end points' normals."""
        ends = self.v_nrm[self.edges.long()]
        return (1.0 - F.cosine_similarity(ends[:, 0], ends[:, 1], dim=-1)).mean()

    def laplacian(self) -> Float[Tensor, ""]:
        """Mean length of the uniform Laplacian: mean of the neighbours minus the vertex."""
        first, second = self.edges.long().unbind(-1)
        ones = torch.ones_like(first, dtype=self.v_pos.dtype)
        total = torch.zeros_like(self.v_pos)
        degree = self.v_pos.new_zeros(self.v_pos.shape[0])
        for here, there in ((first, second), (second, first)):
            total = total.index_add(0, here, self.v_pos[there])
            degree = degree.index_add(0, here, ones)
        difference = total / degree.clamp(min=1.0)[:, None] - self.v_pos
        return (difference * (degree > 0)[:, None]).norm(dim=-1).mean()
