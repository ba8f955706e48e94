"""The API for users: mappers from files to a grid of images, on a tiny random model."""

import pytest
import torch

from custom.fourd.data.pair_cells import orbit_cameras
from custom.fourd.diffusion.image_prior import load_image_prior
from custom.fourd.mappers.checkpoint import MapperFacts, save_mapper
from custom.fourd.mappers.composition import PLACEHOLDERS, Composition
from custom.fourd.mappers.control_sampling import SamplingOptions
from custom.fourd.mappers.controlled_prior import ControlledPrior
from custom.fourd.mappers.inference import TimeViewControls, load_controls, orbit_views
from custom.fourd.mappers.mapper import Mapper, MapperConfig
from tests.fixtures.controlled_models import adapter_of, write_controlled_folder

SAMPLING = {"steps": 2, "image_scale": 2.0, "control_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_controlled_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(folder):
    """A mapper of every kind, as training writes them."""
    paths = {}
    for kind in ("time", "view", "joint"):
        composition = Composition("joint_token" if kind == "joint" else "tokens")
        model = ControlledPrior(load_image_prior(str(folder)), None, composition)
        config = MapperConfig(kind, model.injection.width, len(model.table), (16, 16))
        mapper = Mapper(config, model.injection.base_norm(PLACEHOLDERS[kind]))
        adapter = adapter_of(folder)
        facts = MapperFacts(
            base_model=str(folder), base_revision=None, layer_table=model.table,
            injection=model.injection.config,
            prompt_template=composition.prompt("a photo of {caption}"), step=4,
            ip_adapter=adapter["weights"], ip_adapter_scale=0.7,
            image_encoder=adapter["image_encoder"], sampling=SAMPLING,
        )  # fmt: skip
        paths[kind] = save_mapper(folder / "mappers" / kind, mapper, facts)[0]
    return paths


@pytest.fixture(scope="module")
def controls(files):
    return load_controls([files["time"], files["view"]])


@pytest.fixture(scope="module")
def image():
    return torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))


def test_a_grid_has_a_cell_for_every_time_and_view(controls, image):
    views = orbit_views([0.0, 90.0, 180.0])
    images = controls.generate(image, [0.0, 0.5], views, prompt="a red cube", seed=1)
    assert images.shape == (2, 3, 16, 16, 3)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    flat = images.flatten(0, 1)
    apart = (flat[:, None] - flat[None]).abs().amax(dim=(2, 3, 4))
    assert bool((apart + torch.eye(6) > 1e-4).all()), "two cells are the same"


def test_cells_are_what_a_batch_of_pairs_gives(controls, image):
    """Written out for one cell: what is told, and the noise that all cells share."""
    views = orbit_views([0.0, 90.0])
    grid = controls.generate(
        image, [0.1, 0.6], views, "a ball", seed=5, source_time=0.1, batch_size=3
    )
    batch = {
        "cond_rgb": image[None], "caption": ["a ball"],
        "time_i": torch.tensor([0.1]), "time_j": torch.tensor([0.6]),
        "camera_a": {k: v[:1] for k, v in views.items()},
        "camera_b": {k: v[1:] for k, v in views.items()},
    }  # fmt: skip
    cell = controls.sample(batch, controls.noise(image, 5))
    torch.testing.assert_close(grid[1, 1], cell[0], rtol=1e-4, atol=1e-4)


def test_seed_prompt_and_source_are_heard(controls, image):
    views = orbit_views([30.0])
    first = controls.generate(image, [0.5], views, "a red cube", seed=1)
    again = controls.generate(image, [0.5], views, "a red cube", seed=1)
    assert torch.equal(first, again)
    others = (
        controls.generate(image, [0.5], views, "a red cube", seed=2),
        controls.generate(image, [0.5], views, "a red cube made of wood", seed=1),
        controls.generate(1 - image, [0.5], views, "a red cube", seed=1),
        controls.generate(image, [0.5], views, "a red cube", seed=1, source_time=0.5),
        controls.generate(image, [0.5], views, "a red cube", 1, source_view=orbit_views([0.0])),
    )
    assert all((other - first).abs().max() > 1e-5 for other in others)


def test_files_name_the_model_its_adapter_and_the_sampling(controls, folder):
    assert controls.model.prior.name == str(folder)
    assert controls.model.ip_adapter.scale == 0.7
    assert controls.sampling == SamplingOptions(**SAMPLING)
    assert controls.template == "a photo of {caption}"
    assert not any(p.requires_grad for m in controls.mappers.values() for p in m.parameters())


def test_one_mapper_and_other_compositions_load(files, image):
    time = load_controls([files["time"]])
    assert (time.follows_time, time.follows_view) == (True, False)
    views = orbit_views([0.0, 90.0])
    same = time.generate(image, [0.5], views)[0]
    torch.testing.assert_close(same[0], same[1], rtol=1e-4, atol=1e-4)
    joint = load_controls([files["joint"]])
    assert joint.follows_time and joint.follows_view
    assert joint.model.composition.mode == "joint_token"
    both = [files["time"], files["view"]]
    guided = load_controls(both, compose={"mode": "guidance", "time_weight": 2.0})
    assert guided.model.composition.weight("time") == 2.0


def test_views_are_the_pair_sources_cameras():
    ours, theirs = orbit_views([0.0, 45.0]), orbit_cameras([15.0], [0.0, 45.0], 3.0, 40.0)
    for key, value in theirs.select(torch.arange(2)).items():
        assert torch.equal(ours[key], value), key


def test_mappers_that_do_not_go_together_are_refused(files, controls):
    with pytest.raises(ValueError, match="compose is 'tokens' and the mappers are time, time"):
        load_controls([files["time"], files["time"]])
    with pytest.raises(ValueError, match="compose is 'attention' .*expected time and view"):
        load_controls([files["view"]], compose="attention")
    with pytest.raises(ValueError, match="different prompt_template"):
        load_controls([files["time"], files["joint"]])
    with pytest.raises(ValueError, match="no mapper is named"):
        load_controls([])
    with pytest.raises(ValueError, match="mappers are none"):
        TimeViewControls(controls.model, {})


def test_another_model_is_refused(files, folder):
    with pytest.raises(ValueError, match="trained for the base model"):
        load_controls([files["time"]], prior=load_image_prior(str(folder) + "/."))


def test_inputs_that_do_not_fit_are_named(controls, image):
    views = orbit_views([0.0])
    with pytest.raises(ValueError, match=r"image has shape \(1, 16, 16, 3\); expected \(height"):
        controls.generate(image[None], [0.0], views)
    with pytest.raises(ValueError, match=r"times are \[1.5\]; expected scene times in \[0, 1\]"):
        controls.generate(image, [1.5], views)
    with pytest.raises(ValueError, match="views lack radius; expected cameras as orbit_views"):
        controls.generate(image, [0.5], {k: v for k, v in views.items() if k != "radius"})


def test_a_file_without_encoder_asks_for_one(files, folder, tmp_path):
    import json

    facts = json.loads(files["time"].with_suffix(".json").read_text())
    facts.pop("image_encoder")
    (tmp_path / "m.json").write_text(json.dumps(facts))
    (tmp_path / "m.safetensors").write_bytes(files["time"].read_bytes())
    with pytest.raises(ValueError, match="names no image_encoder; expected one. Give ip_adapter"):
        load_controls([tmp_path / "m"])
    assert load_controls([tmp_path / "m"], ip_adapter=adapter_of(folder)).model.vision is not None
