"""Materials: colours by hand, modes and their probabilities."""

import pytest
import threestudio
import torch
from threestudio.models.materials.base import BaseMaterial

UP = torch.tensor([[0.0, 0.0, 1.0]])


class TestNoMaterial:
    def build(self, **config):
        torch.manual_seed(0)
        return threestudio.find("no-material")(config)

    def test_activates_the_features_and_ignores_the_rest(self):
        features = torch.tensor([[0.0, 1.0, -1.0]])
        colors = self.build()(features=features, positions=UP, viewdirs=UP, density=None)
        assert torch.equal(colors, torch.sigmoid(features))

    def test_network(self):
        network = {"otype": "VanillaMLP", "activation": "ReLU", "output_activation": "none"}
        network |= {"n_neurons": 8, "n_hidden_layers": 1}
        material = self.build(input_feature_dims=5, mlp_network_config=network, n_output_dims=2)
        assert material(features=torch.randn(3, 4, 5)).shape == (3, 4, 2)
        assert not self.build(input_feature_dims=5).use_network

    def test_normals_on_request(self):
        assert self.build(requires_normal=True).requires_normal
        assert not self.build().requires_normal

    def test_wrong_width(self):
        with pytest.raises(ValueError, match="got 5 features; expected n_output_dims = 3"):
            self.build()(features=torch.zeros(2, 5))

    def test_export_is_an_albedo_in_range(self):
        material = self.build(n_output_dims=4, color_activation="none")
        albedo = material.export(features=torch.tensor([[2.0, -1.0, 0.5, 9.0]]))["albedo"]
        assert albedo.tolist() == [[1.0, 0.0, 0.5]]


class TestDiffuse:
    def build(self, step=5000, training=True, **config):
        material = threestudio.find("diffuse-with-point-light-material")(config).train(training)
        material.do_update_step(0, step)
        return material

    def shade(self, material, light=(0.0, 0.0, 3.0), normal=UP, **kwargs):
        features = torch.tensor([[0.0, 2.0, -2.0]])
        return material(
            features=features,
            positions=torch.zeros(1, 3),
            shading_normal=normal,
            light_positions=torch.tensor([light]),
            **kwargs,
        )

    albedo = torch.sigmoid(torch.tensor([[0.0, 2.0, -2.0]]))

    @pytest.mark.parametrize(
        ("light", "cosine"), [((0, 0, 3), 1.0), ((3, 0, 3), 0.5**0.5), ((0, 0, -1), 0.0)]
    )
    def test_lambert_by_hand(self, light, cosine):
        material = self.build()
        light = tuple(float(v) for v in light)
        shading = 0.9 * cosine + 0.1
        lit = self.shade(material, light, shading="diffuse")
        assert torch.allclose(lit, self.albedo * shading, atol=1e-6)
        white = self.shade(material, light, shading="textureless")
        assert torch.allclose(white, torch.full((1, 3), shading), atol=1e-6)
        assert torch.allclose(self.shade(material, light, shading="albedo"), self.albedo)

    def test_ambient_ratio_overrides_the_colours(self):
        lit = self.shade(self.build(), (3.0, 0.0, 3.0), shading="diffuse", ambient_ratio=0.25)
        assert torch.allclose(lit, self.albedo * (0.75 * 0.5**0.5 + 0.25), atol=1e-6)

    n_steps = 160

    def modes(self, **config):
        counts = {"albedo": 0, "textureless": 0, "diffuse": 0}
        light = (3.0, 0.0, 3.0)
        material = self.build(**config)
        for step in range(5000, 5000 + self.n_steps):
            material.do_update_step(0, step)
            output = self.shade(material, light)
            for mode in counts:
                counts[mode] += torch.equal(output, self.shade(material, light, shading=mode))
        return counts

    def test_modes_come_with_their_probabilities(self):
        counts = self.modes()
        assert sum(counts.values()) == 160
        # Expected 40, 60 and 60 of 160: three standard deviations are 19.
        assert abs(counts["albedo"] - 40) < 19
        assert abs(counts["textureless"] - 60) < 19

    def test_certain_modes(self):
        assert self.modes(diffuse_prob=0.0)["albedo"] == 160
        assert self.modes(diffuse_prob=1.0, textureless_prob=1.0)["textureless"] == 160

    def test_albedo_alone_at_first(self):
        early = self.build(step=999, diffuse_prob=1.0)
        assert torch.equal(self.shade(early, (3.0, 0.0, 3.0)), self.albedo)
        late = self.build(step=1000, diffuse_prob=1.0)
        assert not torch.equal(self.shade(late, (3.0, 0.0, 3.0)), self.albedo)

    def test_evaluation(self):
        lit = self.shade(self.build(step=0, training=False), (3.0, 0.0, 3.0))
        assert torch.allclose(lit, self.albedo * (0.9 * 0.5**0.5 + 0.1), atol=1e-6)
        plain = self.build(step=0, training=False, ambient_only_on_test=True)
        assert torch.equal(self.shade(plain), self.albedo)

    def test_soft_shading_draws_its_share_per_step(self):
        def shares(steps):
            values = []
            material = self.build(soft_shading=True)
            for step in steps:
                material.do_update_step(0, step)
                lit = self.shade(material, (0.0, 0.0, -1.0), shading="textureless")
                values.append(lit[0, 0].item())  # the ambient share alone
            return values

        first = shares(range(20))
        assert first == shares(range(20)) and len(set(first)) == 20
        assert 0 < min(first) and max(first) <= 1

    def test_gradient_reaches_features_and_normals(self):
        features = torch.zeros(1, 3, requires_grad=True)
        normal = torch.tensor([[0.6, 0.0, 0.8]], requires_grad=True)
        for mode in ("albedo", "textureless", "diffuse"):
            output = self.build()(
                features=features,
                positions=torch.zeros(1, 3),
                shading_normal=normal,
                light_positions=UP,
                shading=mode,
            )
            grads = torch.autograd.grad(output.sum(), (features, normal))
            assert grads[0].any() == (mode != "textureless")
            assert grads[1].any() == (mode != "albedo")

    def test_unknown_shading(self):
        with pytest.raises(ValueError, match="shading is 'phong'; expected 'albedo'"):
            self.shade(self.build(), shading="phong")

    def test_export(self):
        material = self.build()
        assert material.requires_normal
        assert torch.equal(material.export(torch.zeros(2, 3))["albedo"], torch.full((2, 3), 0.5))


def test_base_material_is_abstract():
    material = BaseMaterial({})
    assert material.export() == {} and not material.requires_normal
    with pytest.raises(NotImplementedError):
        material()
