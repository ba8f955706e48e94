import pytest
import torch

import custom.fourd  # noqa: F401 - registers the tables
from custom.fourd.diffusion.multiview_prior import load_multiview_prior
from custom.fourd.scripts.convert_multiview import main
from tests.fixtures.model_folders import ldm_multiview_state, write_stable_diffusion_folder


def test_the_folder_is_the_checkpoint_in_half_precision(tmp_path, capsys):
    state = ldm_multiview_state()
    torch.save(state, tmp_path / "mv.pt")
    text = write_stable_diffusion_folder(tmp_path / "sd")
    main([str(tmp_path / "mv.pt"), str(tmp_path / "folder"), "--text", str(text)])
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
    assert (tmp_path / "folder" / "text_encoder" / "model.safetensors").is_file()
    assert not list((tmp_path / "folder").rglob("*.bin"))
    with pytest.raises(FileExistsError, match="folder is not empty; give the name of a new folder"):
        main([str(tmp_path / "mv.pt"), str(tmp_path / "folder")])
