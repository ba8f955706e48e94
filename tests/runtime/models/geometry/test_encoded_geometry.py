"""What a geometry on an encoding builds, and the slope of its field."""

import pytest
import torch
from threestudio.models.geometry.encoded_geometry import EncodedGeometry

SMALL = {
    "pos_encoding_config": {"otype": "Frequency", "n_frequencies": 2},
    "mlp_network_config": {"otype": "VanillaMLP", "activation": "ReLU", "n_neurons": 4,
                           "output_activation": "none", "n_hidden_layers": 1},
}  # fmt: skip


class Geometry(EncodedGeometry):
    def configure(self):
        super().configure()
        self.own_network = self._network(1)
        self._build_heads()


def build(**config):
    return Geometry({**SMALL, **config})


def bowl(points):
    """x^2 + y: slope (2 x, 1, 0)."""
    return points[..., :1].square() + points[..., 1:2]


def test_heads_follow_the_configuration_in_the_order_of_upstreams_parameters():
    def parts(**config):
        return [name for name, _ in build(**config).named_children()]

    assert parts() == ["encoding", "own_network", "feature_network"]
    assert parts(n_feature_dims=0) == ["encoding", "own_network"]
    assert parts(normal_type="pred")[-1] == "normal_network"


def test_features_keep_the_shape_of_the_points():
    geometry, points = build(n_feature_dims=5), torch.rand(2, 3, 3)
    encoded = geometry.encoding(points.reshape(-1, 3))
    features = geometry._features(points, encoded)["features"]
    torch.testing.assert_close(features.reshape(6, 5), geometry.feature_network(encoded))
    assert features.shape == (2, 3, 5)
    assert build(n_feature_dims=0)._features(points, encoded) == {}


@pytest.mark.parametrize(
    "kind, off_by",
    [("analytic", 0.0), ("finite_difference_laplacian", 0.0), ("finite_difference", 0.125)],
)
def test_the_slope_by_each_way(kind, off_by):
    points = torch.tensor([[0.25, -0.5, 0.0]], requires_grad=True)
    geometry = build(normal_type=kind)
    slope = geometry._slope(bowl, points, bowl(points), 0.125, keeps_graph=False)
    # One-sided: ((x + e)^2 - x^2) / e = 2 x + e.
    torch.testing.assert_close(slope.detach(), torch.tensor([[0.5 + off_by, 1.0, 0.0]]))


def test_neighbours_stay_in_the_box():
    points = torch.tensor([[0.0, 0.5, 0.0]])
    geometry = build(normal_type="finite_difference", radius=0.5)
    slope = geometry._slope(bowl, points, bowl(points), 0.125, keeps_graph=False)
    assert slope[0, 1] == 0.0, "the neighbour beyond the wall is the point itself"


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="normal_type is 'up'; expected one of finite_difference"):
        build(normal_type="up")
