"""The command: folders that the guidances load, written whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from threestudio.models.guidance.noise_schedule import noise_schedule
from threestudio.utils.diffusers_folder import load_model, read_config

import custom.fourd  # noqa: F401 - registers the models' classes
from custom.fourd.diffusion.multiview_prior import load_multiview_prior
from custom.fourd.scripts import convert_checkpoint as script
from custom.fourd.scripts.convert_multiview import main as convert_multiview
from tests.fixtures import original_layouts as layouts
from tests.fixtures.model_folders import write_stable_diffusion_folder

CPU = torch.device("cpu")
KINDS = {
    "stable-diffusion": "UNet2DConditionModel",
    "mvdream": "UNet2DConditionModel",
    "modelscope-video": "UNet3DConditionModel",
    "videocrafter": "VideoCrafterUNet",
}


def tiny(layout):
    return layouts.random_state(layouts.checkpoint_shapes(layout, tiny=True))


def save_source(kind, state, folder):
    """A kind's own file format."""
    if kind == "stable-diffusion":
        save_file(state, folder / "sd.safetensors")
        return folder / "sd.safetensors"
    if kind == "modelscope-video":
        torch.save(layouts.below(state, layouts.UNET), folder / "text2video_pytorch_model.pth")
        vae = {k: v for k, v in state.items() if k.startswith(layouts.AUTOENCODER)}
        torch.save({"state_dict": vae}, folder / "VQGAN_autoencoder.pth")
        text = layouts.below(state, layouts.OPEN_CLIP)
        torch.save(text, folder / "open_clip_pytorch_model.bin")
        return folder
    wrapped = {"state_dict": state} if kind == "videocrafter" else state
    torch.save(wrapped, folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_loads_with_the_original_s_values(kind, tmp_path, capsys):
    state = tiny(kind)
    source = save_source(kind, state, tmp_path)
    target = tmp_path / "out" / "folder"
    script.main(["--kind", kind, str(source), str(target), "--precision", "fp32"])
    said = capsys.readouterr().out.splitlines()
    assert said == ["without tokenizer: the source holds none; --text copies a tokenizer",
                    str(target)]  # fmt: skip
    unet = load_model(target, "unet", CPU)
    assert type(unet).__name__ == KINDS[kind]
    first = state[f"{layouts.UNET}input_blocks.0.0.weight"]
    assert torch.equal(unet.conv_in.weight, first)
    assert load_model(target, "vae", CPU).quant_conv.weight.shape == (8, 8, 1, 1)
    text = load_model(target, "text_encoder", CPU)
    words = state[f"{layouts.OPEN_CLIP}token_embedding.weight"]
    assert torch.equal(text.get_input_embeddings().weight, words)
    schedule = noise_schedule(read_config(target, "scheduler"))
    assert schedule.prediction_type == "epsilon" and schedule.num_train_timesteps == 1000
    assert not list(target.rglob("*.bin")) and os.listdir(target.parent) == ["folder"]


def test_mvdream_in_half_precision_is_the_original(tmp_path, capsys):
    state = tiny("mvdream")
    torch.save(state, tmp_path / "mv.pt")
    text = write_stable_diffusion_folder(tmp_path / "sd")
    convert_multiview([str(tmp_path / "mv.pt"), str(tmp_path / "folder"), "--text", str(text)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "folder")
    original = load_multiview_prior(str(tmp_path / "mv.pt"))
    converted = load_multiview_prior(str(tmp_path / "folder"))
    assert converted.facts == original.facts
    assert torch.equal(converted.schedule.alphas_cumprod, original.schedule.alphas_cumprod)
    for mine, theirs in (
        (converted.unet.state_dict(), original.unet.state_dict()),
        (converted.autoencoder.state_dict(), original.autoencoder.state_dict()),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], value.half().float()) for name, value in theirs.items())
    stored = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    # The checkpoint's own text encoder, the other model's tokenizer.
    assert read_config(tmp_path / "folder", "text_encoder")["num_hidden_layers"] == 2
    assert (tmp_path / "folder" / "tokenizer" / "vocab.json").is_file()


def test_a_text_encoder_is_copied_where_the_checkpoint_has_none(tmp_path):
    torch.save(layouts.below(tiny("modelscope-video"), layouts.UNET), tmp_path / "zeroscope.pth")
    text = write_stable_diffusion_folder(tmp_path / "sd")
    folder = script.convert(
        "modelscope-video", tmp_path / "zeroscope.pth", tmp_path / "folder", str(text)
    )
    copied = (folder / "text_encoder" / "model.safetensors").read_bytes()
    assert copied == (text / "text_encoder" / "model.safetensors").read_bytes()
    assert script.missing_components(folder) == ["vae"]


def test_velocity_is_written_where_it_is_said(tmp_path):
    source = save_source("stable-diffusion", tiny("stable-diffusion"), tmp_path)
    arguments = ["--kind", "stable-diffusion", str(source), str(tmp_path / "folder")]
    script.main([*arguments, "--prediction-type", "v_prediction"])
    scheduler = read_config(tmp_path / "folder", "scheduler")
    assert scheduler["prediction_type"] == "v_prediction"


def test_a_folder_of_pickles_becomes_one_of_safetensors(tmp_path):
    source = write_stable_diffusion_folder(tmp_path / "old")
    weights = source / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    torch.save(state, weights.with_suffix(".bin"))
    weights.unlink()
    folder = script.convert("diffusers", source, tmp_path / "new", precision="fp32")
    assert load_file(folder / "unet" / weights.name).keys() == state.keys()
    assert load_model(folder, "unet", CPU).config.block_out_channels == [16, 32]
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        kept = sorted(path.name for path in (source / part).iterdir())
        assert sorted(path.name for path in (folder / part).iterdir()) == kept


def test_nothing_is_overwritten(tmp_path):
    source = save_source("mvdream", tiny("mvdream"), tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="folder is not empty; give the name of a new folder"):
        script.convert("mvdream", source, tmp_path / "folder")
    assert (tmp_path / "folder" / "mine.txt").read_text() == "mine"


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    source = save_source("mvdream", tiny("mvdream"), tmp_path)
    before = sorted(os.listdir(tmp_path))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "_write_facts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.convert("mvdream", source, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == before


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("canary",))


def test_code_in_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors.*Code in a checkpoint is never"):
        script.convert("videocrafter", tmp_path / "model.ckpt", tmp_path / "folder")
    assert not (tmp_path / "canary").exists() and not (tmp_path / "folder").exists()
