"""Pixels between rendered rays: linear images come out whole, and a step sees whole images."""

import pytest
import threestudio
import torch
from threestudio.systems.efficient_dreamfusion import fill_between

from tests.fixtures.prompted_runs import prompted_config


@pytest.mark.parametrize("first_row, first_column", [(0, 0), (2, 1)])
def test_an_image_that_is_linear_between_the_rays_is_restored(first_row, first_column):
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(8.0), indexing="ij")
    image = torch.stack([rows, columns, 2 * rows - columns], dim=-1)[None].repeat(2, 1, 1, 1)
    kept = first_row + 3 * torch.arange(4), first_column + 2 * torch.arange(4)
    places = kept[0][:, None] * 8 + kept[1]
    found = fill_between(image[:, kept[0]][:, :, kept[1]], places, 12, 8)
    assert found.shape == (2, 12, 8, 3)
    inside = (slice(None), slice(first_row, first_row + 10), slice(first_column, first_column + 7))
    torch.testing.assert_close(found[inside], image[inside], atol=1e-4, rtol=0)
    # Beyond the outermost rays their colour is repeated.
    torch.testing.assert_close(found[:, 0, first_column], image[:, first_row, first_column])


def test_a_single_ray_fills_the_image():
    found = fill_between(torch.full((1, 1, 1, 3), 0.4), torch.tensor([[7]]), 4, 4)
    torch.testing.assert_close(found, torch.full((1, 4, 4, 3), 0.4))


def test_the_guidance_sees_whole_images_made_of_few_rays():
    module = threestudio.find("eff-random-camera-datamodule")(
        {"height": 12, "width": 8, "sample_height": 4, "sample_width": 4, "batch_size": 2}
    )
    batch = module.build_train_dataset().collate({"step": 0, "batch_in_step": 0})
    config = prompted_config("efficient-dreamfusion-system", "unused")["system"]
    system = threestudio.find("efficient-dreamfusion-system")(
        {**config, "loss": {"lambda_sds": 1.0, "lambda_sparsity": 1.0}}
    )
    system.log = lambda *_, **__: None
    system.set_resume_status(0, 0)
    system.do_update_step(0, 0)
    out = system(batch)
    assert out["comp_rgb"].shape == (2, 12, 8, 3) and out["opacity"].shape == (2, 4, 4, 1)
    mask, rendered = batch["efficiency_mask"], system.renderer(**batch)["comp_rgb"]
    at_rays = out["comp_rgb"].flatten(1, 2)[:, mask.flatten()]
    torch.testing.assert_close(at_rays, rendered.flatten(1, 2), atol=1e-5, rtol=1e-4)

    def answer(rgb, prompt_utils, **_):
        assert rgb.shape == (2, 12, 8, 3)
        return {"loss_sds": rgb.mean()}

    system.guidance, system.prompt_utils = answer, None
    system.training_step(batch, 0)["loss"].backward()
    assert system.geometry.encoding.encoding.encoding.params.grad.abs().sum() > 0
    view = {k: v for k, v in batch.items() if k != "efficiency_mask"}
    assert system(view)["comp_rgb"].shape == (2, 4, 4, 3)
