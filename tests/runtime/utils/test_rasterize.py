"""The wrapper of nvdiffrast; a small module in its place stands for the package, which is CUDA's.

The stand-in rasterises by hand: one triangle covers the left half of every image.
"""

import sys
from types import ModuleType

import pytest
import torch
from threestudio.utils.rasterize import NVDiffRasterizerContext


class ByHand(ModuleType):
    """nvdiffrast.torch as far as its contract matters here: batches, types, arguments."""

    def __init__(self):
        super().__init__("nvdiffrast.torch")
        self.made = []
        for kind in ("GL", "Cuda"):
            name = f"Rasterize{kind}Context"
            setattr(self, name, lambda device, name=name: self.made.append(name) or name)

    def rasterize(self, ctx, pos, tri, resolution, grad_db):
        assert pos.dtype == torch.float32 and tri.dtype == torch.int32 and grad_db
        assert pos.ndim == 3 and ctx in self.made
        rast = torch.zeros(pos.shape[0], *resolution, 4)
        rast[:, :, : resolution[1] // 2, 3] = 1
        return rast, torch.ones_like(rast)

    def interpolate(self, attr, rast, tri, rast_db, diff_attrs):
        assert attr.dtype == torch.float32 and tri.dtype == torch.int32
        covered = (rast[..., 3:] > 0).float()
        return covered * attr.mean(dim=1)[:, None, None], (rast_db, diff_attrs)

    def antialias(self, color, rast, pos, tri):
        assert color.dtype == pos.dtype == torch.float32 and tri.dtype == torch.int32
        return color / 2


@pytest.fixture
def package(monkeypatch):
    made = ByHand()
    root = ModuleType("nvdiffrast")
    root.torch = made
    monkeypatch.setitem(sys.modules, "nvdiffrast", root)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", made)
    return made


TRIANGLE = torch.tensor([[0, 1, 2]])


def test_vertices_go_to_clip_space(package):
    context = NVDiffRasterizerContext("cuda", "cpu")
    matrices = torch.stack([torch.eye(4), 2 * torch.eye(4)])
    matrices[1, 0, 3] = 5.0
    clip = context.vertex_transform(torch.tensor([[1.0, 2.0, 3.0]]), matrices)
    assert clip.tolist() == [[[1, 2, 3, 1]], [[7, 4, 6, 2]]]


@pytest.mark.parametrize(
    ("kind", "name"), [("gl", "RasterizeGLContext"), ("cuda", "RasterizeCudaContext")]
)
def test_calls_reach_the_package_in_its_types(package, kind, name):
    context = NVDiffRasterizerContext(kind, "cpu")
    assert package.made == [name]
    pos = torch.rand(2, 3, 4, dtype=torch.float64)
    rast, rast_db = context.rasterize(pos, TRIANGLE, 4)
    assert rast.shape == rast_db.shape == (2, 4, 4, 4)
    assert context.rasterize(pos, TRIANGLE, (2, 6))[0].shape == (2, 2, 6, 4)
    assert context.rasterize_one(pos[0], TRIANGLE, (2, 6))[1].shape == (2, 6, 4)
    attributes = torch.full((2, 3, 5), 0.5, dtype=torch.float16)
    values, rest = context.interpolate(attributes, rast, TRIANGLE, rast_db, "all")
    assert values[0, 0, :, 0].tolist() == [0.5, 0.5, 0, 0] and rest == (rast_db, "all")
    shared, _ = context.interpolate_one(attributes[0], rast, TRIANGLE)
    assert torch.equal(shared, values)
    assert torch.equal(context.antialias(values.half(), rast, pos, TRIANGLE), values / 2)


def test_what_is_missing_is_said_in_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="context_type is 'egl'; expected 'gl' or 'cuda'"):
        NVDiffRasterizerContext("egl", "cpu")
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", None)
    with pytest.raises(ImportError, match="needs the package nvdiffrast and a CUDA GPU; install"):
        NVDiffRasterizerContext("cuda", "cpu")
