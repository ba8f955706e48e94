"""What the systems start from: mappers of files, ranges, templates, compositions, refusals."""

from types import SimpleNamespace

import pytest
import torch
from threestudio.launcher.starting_point import has_weights

from custom.fourd.data.fourd_pair_datamodule import FourdPairDataModule
from custom.fourd.mappers.checkpoint import load_mapper
from custom.fourd.mappers.prompt_templates import NEUTRAL_TEMPLATES
from custom.fourd.systems.time_mapper_system import TimeMapperSystem
from custom.fourd.systems.time_view_mapper_system import TimeViewMapperSystem
from custom.fourd.systems.view_mapper_system import ViewMapperSystem
from tests.fixtures.controlled_models import adapter_of, pair_of_images, write_controlled_folder
from tests.fixtures.ip_adapters import PROJECTED_WIDTH

OPTIMIZER = {"name": "AdamW", "args": {"lr": 0.01}, "params": {"mappers": {"lr": 0.01}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_controlled_folder(tmp_path_factory.mktemp("model"))


def build(folder, system=TimeViewMapperSystem, adapter=False, **changes):
    mapper = {"hidden": [16], **changes.pop("mapper", {})}
    made = system({
        "base_model": str(folder), "mapper": mapper, "optimizer": OPTIMIZER,
        "ip_adapter": adapter_of(folder) if adapter else None, **changes,
    })  # fmt: skip
    made.log = lambda *_, **__: None
    return made


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Mappers of stages A and B, unlike fresh ones."""
    root, paths = tmp_path_factory.mktemp("stages"), []
    for kind, system in (("time", TimeMapperSystem), ("view", ViewMapperSystem)):
        made = build(folder, system)
        with torch.no_grad():
            made.mappers[kind].head.bias += 1.0
            made.mappers[kind].axis_low += 0.125
        paths += made.save_mappers(root)
    return [str(path) for path in paths]


# Stage C


def test_stage_c_starts_from_a_and_b_with_smaller_steps(folder, trained):
    made = build(folder, mapper_weights=trained)
    for path, kind in zip(trained, ("time", "view"), strict=True):
        file = load_mapper(path)[0].state_dict()
        for key, value in made.mappers[kind].state_dict().items():
            assert torch.equal(value, file[key]), key
        assert all(parameter.requires_grad for parameter in made.mappers[kind].parameters())
    assert rates(made) == pytest.approx([0.001, 0.001])
    made.cfg.mapper_weights_lr = 0.5
    assert rates(made) == pytest.approx([0.005, 0.005])
    assert rates(build(folder)) == [0.01, 0.01]


def rates(system):
    """Learning rates of the groups with and without weight decay."""
    return [group["lr"] for group in system.configure_optimizers()["optimizer"].param_groups]


def test_one_mapper_may_start_fresh(folder, trained):
    made = build(folder, mapper_weights=trained[:1])
    assert float(made.mappers["time"].axis_low[0]) == 0.125
    assert torch.equal(made.mappers["view"].head.bias, build(folder).mappers["view"].head.bias)


def test_mappers_that_have_no_place_are_refused(folder, trained):
    with pytest.raises(ValueError, match="of kind 'view'; expected at most one of each of time"):
        build(folder, TimeMapperSystem, mapper_weights=trained)
    with pytest.raises(ValueError, match="of kind 'time'; expected at most one of each"):
        build(folder, mapper_weights=[trained[0], trained[0]])


def test_a_test_may_start_from_mappers_alone():
    """What composes A and B without training is tested without any checkpoint."""
    for system, keys, expected in (
        ("time-view-mapper-system", {"mapper_weights": ["a", "b"]}, True),
        ("time-view-mapper-system", {"mapper_weights": []}, False),
        ("time-view-mapper-system", {"weights": "x.ckpt"}, True),
        ("fourdfy-system", {"mapper_weights": ["a"]}, False),
        ("fourdfy-system", {"weights": "x.ckpt"}, True),
    ):
        assert has_weights(SimpleNamespace(system_type=system, system=keys)) is expected


# Ranges


@pytest.fixture(scope="module")
def data():
    made = FourdPairDataModule({
        "scenes": ["a red cube sliding"], "n_times": 8, "n_azimuths": 8,
        "elevations_deg": [0.0, 30.0], "height": 16, "width": 16,
    })  # fmt: skip
    made.setup("fit")
    return made


def began(system, data):
    system._trainer = SimpleNamespace(datamodule=data, state=SimpleNamespace(fn="fit"))
    system.on_fit_start()
    return {
        axis.name: (float(low), float(high))
        for mapper in system.mappers.values()
        for axis, low, high in zip(mapper.axes, mapper.axis_low, mapper.axis_high, strict=True)
    }


def test_fresh_mappers_take_the_ranges_of_the_training_pairs(folder, data):
    found = began(build(folder), data)
    top = torch.deg2rad(torch.tensor(30.0)).item()
    assert found["elevation_b"] == pytest.approx((0.0, top))
    assert found["delta_elevation"] == pytest.approx((-top, top))
    assert found["time_j"] == (0.0, 1.0) and found["sin_azimuth_b"] == (-1.0, 1.0)
    # All cameras are 3 away: the width stays, around log 3.
    low, high = found["log_radius_b"]
    assert high - low == pytest.approx(3.0) and (high + low) / 2 == pytest.approx(1.0986, abs=1e-3)


def test_trained_mappers_keep_their_ranges(folder, trained, data):
    made = build(folder, mapper_weights=trained)
    before = {kind: mapper.axis_low.clone() for kind, mapper in made.mappers.items()}
    began(made, data)
    for kind, mapper in made.mappers.items():
        assert torch.equal(mapper.axis_low, before[kind])


# Prompts, compositions, scene codes


def test_training_draws_templates_and_tests_do_not(folder):
    made = build(folder, training_templates="imagenet", prompt_template="{caption}")
    assert made.training_templates == NEUTRAL_TEMPLATES
    captions = ["a red cube"] * 40
    ids = made._training_prompts(captions, step=3, first=0).input_ids
    assert len(ids.unique(dim=0)) > 10
    assert torch.equal(made._training_prompts(captions[:5], 3, 2).input_ids, ids[2:7])
    assert made.steering.template == "{caption}"
    made.cfg.training_templates = None
    made._check_templates()
    assert made.training_templates == ("{caption}",)


@pytest.mark.parametrize("mode", ["guidance", "joint_token"])
def test_compositions_are_keys_of_the_config(folder, mode):
    made = build(folder, compose={"mode": mode, "time_weight": 0.7})
    assert made.model.composition.mode == mode
    assert made.model.composition.weight("time") == 0.7
    assert set(made.mappers) == ({"joint"} if mode == "joint_token" else {"time", "view"})
    made.training_step(pair_of_images(3), 0)["loss"].backward()
    assert all(float(p.grad.abs().max()) > 0 for p in made.mappers.parameters())


def test_a_single_control_composes_with_nothing(folder):
    with pytest.raises(ValueError, match="compose is 'guidance' and the mappers are time"):
        build(folder, TimeMapperSystem, compose={"mode": "guidance"})


def test_scene_codes_learn_and_cached_features_are_heard(folder):
    width = {"scene_features": PROJECTED_WIDTH}
    made = build(folder, adapter=True, mapper=width, drop_control=0.0, drop_image=0.0)
    batch = pair_of_images(3)
    made.training_step(batch, 0)["loss"].backward()
    assert float(made.mappers["time"].scene_code.weight.grad.abs().max()) > 0
    with torch.no_grad():
        features = made.model.image_features(batch)
        cached = made.training_step({**batch, "cond_features": features}, 0)["loss"]
        assert torch.equal(cached, made.training_step(batch, 0)["loss"])
        other = made.training_step({**batch, "cond_features": features + 1}, 0)["loss"]
        assert not torch.equal(cached, other)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"compose": {"how": 1}}, "system.compose has the key 'how'; expected some of mode"),
        ({"grid": {"rows": 1}}, "system.grid has the key 'rows'; expected some of n_times"),
        ({"evaluation": {"baselines": ["best"]}}, "baselines holds 'best'; expected some of copy"),
        ({"evaluation": {"features": "vision"}}, "features is 'vision', and system.ip_adapter is"),
        ({"prompt_template": "{what}"}, "system.prompt_template holds '{what}'"),
        ({"training_templates": ["{what}"]}, "system.training_templates holds '{what}'"),
    ],
)
def test_keys_are_checked_before_a_model_is_loaded(keys, message):
    with pytest.raises(ValueError, match=message):
        build("no/such/model", **keys)
