"""A part of the rays: exactly those of the whole camera, at the places that the mask names."""

import pytest
import threestudio
import torch

SMALL = {"height": 12, "width": 8, "sample_height": 4, "sample_width": 4, "batch_size": 2}


def datasets(**config):
    eff = threestudio.find("eff-random-camera-datamodule")({**SMALL, **config})
    whole_keys = {k: v for k, v in {**SMALL, **config}.items() if not k.startswith("sample")}
    whole = threestudio.find("random-camera-datamodule")(whole_keys)
    return eff.build_train_dataset(), whole.build_train_dataset()


@pytest.mark.parametrize("step", [0, 1, 7])
def test_rays_are_those_of_the_whole_image_at_the_masks_places(step):
    eff, whole = (d.collate({"step": step, "batch_in_step": 0}) for d in datasets())
    mask = eff["efficiency_mask"]
    assert mask.shape == (4, 4) and eff["rays_o"].shape == (2, 4, 4, 3)
    rows, columns = mask // 8, mask % 8
    assert torch.equal(rows[1:] - rows[:-1], torch.full((3, 4), 3))
    assert torch.equal(columns[:, 1:] - columns[:, :-1], torch.full((4, 3), 2))
    for key in ("rays_o", "rays_d"):
        assert torch.equal(eff[key], whole[key][:, rows, columns])
    for key in ("c2w", "mvp_mtx", "elevation", "light_positions"):
        assert torch.equal(eff[key], whole[key])
    assert (eff["height"], eff["width"], eff["sample_height"], eff["sample_width"]) == (12, 8, 4, 4)


def test_every_pixel_has_its_turn():
    dataset, _ = datasets()
    seen = {
        int(place) for step in range(60) for place in
        dataset.collate({"step": step, "batch_in_step": 0})["efficiency_mask"].flatten()
    }  # fmt: skip
    assert seen == set(range(96))


def test_defaults_and_evaluation_are_whole():
    module = threestudio.find("eff-random-camera-datamodule")({"eval_height": 6, "eval_width": 6})
    assert (module.cfg.height, module.cfg.sample_width) == (128, 64)
    module.setup("validate")
    view = module.val_dataset[0]
    assert view["rays_o"].shape == (6, 6, 3) and "efficiency_mask" not in view


@pytest.mark.parametrize("config, message", [
    ({"sample_height": 5}, "data.sample_height is 5 and data.height 12; expected a divisor"),
    ({"sample_width": 0}, "data.sample_width has the value 0; expected an integer of at least 1"),
    ({"height": [12, 6], "width": [8, 8], "batch_size": [1, 1], "resolution_milestones": [3]},
     "data.sample_height is 4 and data.height 6"),
])  # fmt: skip
def test_uneven_parts_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        datasets(**config)
