"""Colours beside latents, by hand."""

import pytest
import threestudio
import torch


def build(**config):
    return threestudio.find("hybrid-rgb-latent-material")(config)


def test_three_channels_are_activated_and_the_rest_untouched():
    features = torch.tensor([[0.0, 1.0, -1.0, 7.0, -3.0]])
    before = features.clone()
    channels = build(n_output_dims=5)(features=features, viewdirs=None)
    assert torch.equal(channels[:, :3], torch.sigmoid(features[:, :3]))
    assert channels[0, 3:].tolist() == [7.0, -3.0]
    assert torch.equal(features, before), "the geometry's output is not written into"
    albedo = build(n_output_dims=5, color_activation="none").export(features=features)["albedo"]
    assert albedo.tolist() == [[0.0, 1.0, 0.0]]


def test_normals_by_default_and_not_on_request():
    assert build().requires_normal and not build(requires_normal=False).requires_normal


def test_another_number_of_features_is_refused():
    with pytest.raises(ValueError, match="got 4 features; expected n_output_dims = 3"):
        build()(features=torch.zeros(1, 4))
