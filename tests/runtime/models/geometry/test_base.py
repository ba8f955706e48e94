"""Contraction, and the extraction of a mesh from a field of known shape."""

import math
from dataclasses import dataclass

import pytest
import torch
from threestudio.models.geometry.base import (
    BaseExplicitGeometry,
    BaseImplicitGeometry,
    contract_to_unisphere,
)

BOX = torch.tensor([[-2.0, -2.0, -2.0], [2.0, 2.0, 2.0]])


class TestContraction:
    def test_bounded_box_becomes_the_unit_cube(self):
        points = torch.tensor([[-2.0, 0.0, 2.0], [4.0, 1.0, 0.0]])
        assert contract_to_unisphere(points, BOX).tolist() == [[0.0, 0.5, 1.0], [1.5, 0.75, 0.5]]

    def test_unbounded_by_hand(self):
        points = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [8.0, 0.0, 0.0], [1e9, 0.0, 0.0]])
        x = contract_to_unisphere(points, BOX, unbounded=True)[:, 0]
        # Norms 0, 1, 4 and infinity go to 0, 1, 2 - 1/4 and 2, then halve around 1/2.
        assert x.tolist() == pytest.approx([0.5, 0.75, 0.5 + 1.75 / 4, 1.0])

    def test_unbounded_is_finite_with_finite_gradients_everywhere(self):
        points = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1e6, -1e6, 3.0]])
        points.requires_grad_()
        contract_to_unisphere(points, BOX, unbounded=True).sum().backward()
        assert torch.isfinite(points.grad).all()

    def test_argument_is_left_alone(self):
        points = torch.full((1, 3), 7.0)
        contract_to_unisphere(points, BOX, unbounded=True)
        assert points.tolist() == [[7.0] * 3]


class Balls(BaseImplicitGeometry):
    """A ball of radius 0.5 and, on request, a speck beside it; the ball moves along x with time."""

    @dataclass
    class Config(BaseImplicitGeometry.Config):
        speck: bool = False

    cfg: Config

    def forward_field(self, points, frame_times=None):
        centre = torch.zeros_like(points)
        if frame_times is not None:
            centre[..., 0] = 0.4 * frame_times
        density = 2.0 - 2.0 * (points - centre).norm(dim=-1, keepdim=True)
        if self.cfg.speck:
            beside = (points - torch.tensor([0.8, 0.8, 0.8])).norm(dim=-1, keepdim=True)
            density = torch.maximum(density, 2.0 - 10.0 * beside)
        return density, None

    def forward_level(self, field, threshold):
        return threshold - field


def euler(mesh):
    return mesh.v_pos.shape[0] - mesh.edges.shape[0] + mesh.t_pos_idx.shape[0]


def extract(frame_time=None, **config):
    config = {"isosurface_resolution": 16, "isosurface_threshold": 1.0, **config}
    return Balls(config).isosurface(frame_time)


class TestIsosurface:
    @pytest.mark.parametrize("coarse_to_fine", [False, True])
    def test_a_ball_is_a_closed_sphere_of_its_radius(self, coarse_to_fine):
        mesh = extract(isosurface_coarse_to_fine=coarse_to_fine)
        assert euler(mesh) == 2
        error = (mesh.v_pos.norm(dim=-1) - 0.5).abs().max()
        # Linear interpolation on an edge of length L, at most the cell's diagonal, errs by
        # L^2 / 8r; keeping vertices off the grid points adds a thousandth of an edge.
        edge = 3**0.5 * (1.2 if coarse_to_fine else 2.0) / 16
        assert error < edge**2 / (8 * 0.5) + edge / 1000
        assert (mesh.v_nrm * mesh.v_pos).sum(-1).min() > 0

    def test_chunks_change_nothing(self):
        assert torch.equal(extract().v_pos, extract(isosurface_chunk=1000).v_pos)

    def test_at_a_time(self):
        assert extract(frame_time=1.0).v_pos[:, 0].mean().item() == pytest.approx(0.4, abs=0.01)
        assert extract().v_pos[:, 0].mean().abs() < 0.01

    def test_specks_go_and_stay_on_request(self):
        kept = extract(speck=True, isosurface_remove_outliers=False)
        cleaned = extract(speck=True, isosurface_outlier_n_faces_threshold=0.2)
        assert euler(kept) == 4 and euler(cleaned) == 2
        assert cleaned.v_pos.norm(dim=-1).max() < 0.6
        coarse = extract(
            speck=True, isosurface_outlier_n_faces_threshold=0.2, isosurface_coarse_to_fine=False
        )
        assert euler(coarse) == 2

    def test_automatic_threshold(self):
        mesh = extract(isosurface_threshold="auto")
        assert 0 < mesh.v_pos.norm(dim=-1).mean() < 1

    def test_refusals(self):
        with pytest.raises(ValueError, match=r"No surface at isosurface_threshold 9: the field"):
            extract(isosurface_threshold=9.0)
        with pytest.raises(ValueError, match="is switched off"):
            extract(isosurface=False)
        with pytest.raises(ValueError, match="isosurface_method is 'mc'; expected 'mt'"):
            extract(isosurface_method="mc")
        with pytest.raises(ValueError, match="isosurface_deformable_grid is not supported"):
            extract(isosurface_deformable_grid=True)
        assert euler(extract(isosurface_method="mc-cpu")) == 2


def test_explicit_geometry_has_a_box():
    assert BaseExplicitGeometry({"radius": 1.5}).bbox.tolist() == [[-1.5] * 3, [1.5] * 3]
    assert math.isclose(BaseImplicitGeometry({}).bbox.abs().max(), 1.0)
    assert BaseExplicitGeometry({}).export() == {}
    for call in (BaseImplicitGeometry({}).forward_field, BaseImplicitGeometry({}).forward):
        with pytest.raises(NotImplementedError):
            call(torch.zeros(1, 3))
