"""Entries of upstream's checkpoints under our names, and VSD's LoRA factors in their places."""

import pytest
import threestudio
import torch
from threestudio.systems.upstream_names import with_our_names
from threestudio.systems.weights import match_state

from tests.fixtures.model_folders import write_stable_diffusion_folder

ROOT = "guidance_single_view"


def state(*names):
    return {name: torch.zeros(2) for name in names}


def test_an_empty_vector_of_parameters_is_nothing_to_report():
    found = {"background.network.w": torch.ones(2), "background.encoding.params": torch.zeros(0)}
    match = match_state(state("background.network.w"), found)
    assert set(match.loadable) == {"background.network.w"}
    assert not (match.dropped or match.fresh or match.problems)


def test_a_second_name_of_a_loaded_tensor_is_left_out():
    grid = torch.ones(2)
    found = {"geometry.encoding.p": grid, "geometry_encoding.p": grid, "other.p": grid.clone()}
    assert set(with_our_names(state("geometry.encoding.p"), found)) == {
        "geometry.encoding.p",
        "other.p",
    }


def test_a_second_name_is_kept_where_nothing_has_the_first():
    grid = torch.ones(2)
    found = {"guidance.p": grid, "guidance_multi_view.p": grid}
    assert match_state(state("geometry.p"), found).dropped == ["guidance", "guidance_multi_view"]


def test_a_wrapped_renderer_is_lifted_unless_ours_is_wrapped_too():
    found = state("renderer.base_renderer.estimator.occs")
    assert set(with_our_names(state("renderer.estimator.occs"), found)) == {
        "renderer.estimator.occs"
    }
    own = state("renderer.base_renderer.estimator.occs")
    assert set(with_our_names(own, found)) == set(own)


def test_what_is_no_tensor_stays():
    found = {"a.w": torch.ones(2), "a._extra_state": {"step": 3}}
    assert set(with_our_names(state("a.w"), found)) == set(found)


@pytest.fixture(scope="module")
def guidance(tmp_path_factory):
    folder = write_stable_diffusion_folder(tmp_path_factory.mktemp("models") / "sd")
    return threestudio.find("stable-diffusion-vsd-guidance")(
        {"pretrained_model_name_or_path": str(folder),
         "pretrained_model_name_or_path_lora": str(folder), "half_precision_weights": False}
    )  # fmt: skip


def upstream_factors(unet):
    """Random factors as diffusers 0.24 numbers them, and the update of each projection.

    Its layers stand in the order of `attn_processors`, which is that of the U-Net's modules: down,
    up, middle.
    """
    stream = torch.Generator().manual_seed(1)
    stored, updates = {}, {}
    for number, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            target = getattr(attention, projection)
            target = target[0] if projection == "to_out" else target
            down = torch.randn(4, target.in_features, generator=stream)
            up = torch.randn(target.out_features, 4, generator=stream)
            key = f"lora_layers.layers.{number}.{projection}_lora"
            stored[f"{key}.down.weight"], stored[f"{key}.up.weight"] = down, up
            suffix = ".0" if projection == "to_out" else ""
            updates[f"{name.removesuffix('.processor')}.{projection}{suffix}"] = up @ down
    return stored, updates


def test_the_order_of_attentions_is_down_up_middle(guidance):
    blocks = [name.split(".")[0] for name in guidance.unet.attn_processors]
    assert blocks == sorted(blocks, key=("down_blocks", "up_blocks", "mid_block").index)


def test_upstream_s_lora_moves_the_projections_that_it_was_trained_on(guidance):
    own = {f"{ROOT}.{name}": value for name, value in guidance.state_dict().items()}
    stored, updates = upstream_factors(guidance.unet)
    found = {f"{ROOT}.{name}": value for name, value in stored.items()}
    for name, value in guidance.camera_embedding.state_dict().items():
        found[f"{ROOT}.camera_embedding.module.{name}"] = torch.ones_like(value)
    match = match_state(own, found)
    assert set(match.loadable) == set(own), match.problems
    guidance.load_state_dict({k.removeprefix(f"{ROOT}."): v for k, v in match.loadable.items()})
    assert guidance.camera_embedding.linear_1.weight.eq(1).all()
    tuned = dict(guidance.unet_lora.named_modules())
    for name, update in updates.items():
        x = torch.eye(tuned[name].in_features)
        plain = tuned[name].base_layer(x)
        assert torch.allclose((tuned[name](x) - plain).T, update, atol=1e-4), name


def test_factors_of_another_model_are_refused_by_name(guidance):
    own = {f"{ROOT}.{name}": value for name, value in guidance.state_dict().items()}
    stored, _ = upstream_factors(guidance.unet)
    found = {f"{ROOT}.{name}": value for name, value in stored.items()}
    found[f"{ROOT}.lora_layers.layers.0.to_q_lora.down.weight"] = torch.zeros(4, 1280)
    (problem,) = match_state(own, found).problems
    assert problem.startswith(f"{ROOT}.lora_layers.down_blocks.0.attentions.0.")
    assert "to_q.lora_A.weight: shape (4, 1280) in the file" in problem
