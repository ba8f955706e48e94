import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from custom.fourd.diffusion.cross_view_attention import (
    cross_view_attention_size,
    set_cross_view_attention,
)
from custom.fourd.diffusion.ldm_conversion import without_prefix
from custom.fourd.diffusion.multiview_prior import (
    build_from_original,
    load_multiview_prior,
    read_original_checkpoint,
)
from tests.fixtures.ldm_reference import LdmUnet, autoencoder_mean
from tests.fixtures.model_folders import ldm_multiview_state, write_multiview_folder


class Payload:
    """Unpickling it would raise; loading must refuse before that."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint ran')",))


@pytest.fixture(scope="module")
def state():
    return ldm_multiview_state()


@pytest.fixture(scope="module")
def inputs():
    g = torch.Generator().manual_seed(5)
    return {
        "x": torch.randn(8, 4, 8, 8, generator=g),
        "timesteps": torch.full((8,), 400),
        "text": torch.randn(8, 7, 24, generator=g),
        "camera": torch.randn(8, 16, generator=g),
    }


@torch.no_grad()
def run(unet, inputs, **changes):
    given = {**inputs, **changes}
    return unet(
        given["x"],
        given["timesteps"],
        encoder_hidden_states=given["text"],
        class_labels=given["camera"],
    ).sample


@torch.no_grad()
def test_converted_unet_computes_what_the_original_computes(state, inputs):
    unet, _ = build_from_original(state)
    reference = LdmUnet(without_prefix(state, "model.diffusion_model."), num_views=4)
    expected = reference(**inputs)
    set_cross_view_attention(unet, 4)
    got = run(unet, inputs)
    relative = (got - expected).norm() / expected.norm()
    # fp32 through two resolutions; the full model measured 1e-6.
    assert relative < 1e-5
    # Negative control: without the joining of views the same comparison fails clearly.
    set_cross_view_attention(unet, 1)
    assert (run(unet, inputs) - expected).norm() / expected.norm() > 1e-3


@torch.no_grad()
def test_each_view_sees_the_views_of_its_own_object_only(state, inputs):
    unet, _ = build_from_original(state)
    set_cross_view_attention(unet, 4)
    before = run(unet, inputs)
    changed = inputs["x"].clone()
    changed[1] += 1.0
    after = run(unet, inputs, x=changed)
    moved = (after - before).flatten(1).norm(dim=1)
    assert (moved[:4] > 1e-3).all()
    torch.testing.assert_close(after[4:], before[4:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_converted_autoencoder_encodes_what_the_original_encodes(state):
    _, autoencoder = build_from_original(state)
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = autoencoder_mean(without_prefix(state, "first_stage_model."), picture)
    got = autoencoder.encode(picture).latent_dist.mean
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_pickle_safetensors_and_ldm_named_folder_are_one_model(state, inputs, tmp_path):
    torch.save({"state_dict": state}, tmp_path / "original.pt")
    save_file(state, tmp_path / "original.safetensors")
    folder = write_multiview_folder(tmp_path / "port")
    shutil.rmtree(folder / "unet")
    (folder / "unet").mkdir()
    unet_state = without_prefix(state, "model.diffusion_model.")
    save_file(unet_state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "MultiViewUNetModel"}))
    priors = [
        load_multiview_prior(str(tmp_path / name))
        for name in ("original.pt", "original.safetensors", "port")
    ]
    outputs = [run(prior.unet, inputs) for prior in priors]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert [cross_view_attention_size(prior.unet) for prior in priors] == [4, 4, 4]
    assert priors[0].facts.image_size == 256 and priors[0].schedule.prediction_type == "epsilon"


def test_a_prior_is_frozen_and_in_evaluation_mode(tmp_path):
    prior = load_multiview_prior(str(write_multiview_folder(tmp_path / "mv")))
    for model in (prior.unet, prior.autoencoder):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())


def test_number_of_views_and_schedule_come_from_the_folder(tmp_path):
    folder = write_multiview_folder(
        tmp_path / "mv",
        num_views=2,
        camera_vector="embedded",
        prediction_type="v_prediction",
        zero_terminal_snr=True,
    )
    prior = load_multiview_prior(str(folder), channels_last=True)
    assert cross_view_attention_size(prior.unet) == 2
    assert prior.facts.camera_vector == "embedded"
    assert prior.schedule.alphas_cumprod[-1] == 0
    assert prior.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_pickle_with_code_is_refused_and_the_code_never_runs(tmp_path):
    torch.save({"weights": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="holds more than tensors.*Code in a checkpoint is never"):
        load_multiview_prior(str(tmp_path / "evil.pt"))


def test_damaged_and_foreign_files_are_refused(state, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="is no valid safetensors file"):
        read_original_checkpoint(tmp_path / "cut.safetensors")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="is damaged or holds more than tensors"):
        read_original_checkpoint(tmp_path / "cut.pt")
    torch.save({"step": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no flat state dict of tensors"):
        read_original_checkpoint(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no tensor below 'first_stage_model.'"):
        build_from_original({k: v for k, v in state.items() if k.startswith("model.")})


def test_a_missing_tensor_is_named(state):
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    with pytest.raises(ValueError, match=r"it lacks mid_block\.resnets\.0\.conv1"):
        build_from_original({k: v for k, v in state.items() if k != name})
