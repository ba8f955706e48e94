"""Which parameters hold motion, and when they and the others train."""

import pytest
import threestudio

from custom.fourd.systems.moving_parts import MovingParts

GRID = {"n_levels": 2, "log2_hashmap_size": 6, "base_resolution": 4, "per_level_scale": 1.5}
DEFORM = {
    "time_encoding_config": {"otype": "HashGrid", **GRID},
    "time_network_config": {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1},
}


def geometry(otype, **keys):
    encoding = {"otype": otype, **GRID, **keys}
    return threestudio.find("implicit-volume")({"pos_encoding_config": encoding})


def training(module):
    names = (name for name, param in module.named_parameters() if param.requires_grad)
    return {name.removeprefix("encoding.encoding.").split(".")[0] for name in names}


def test_the_4d_grid_follows_the_kind_of_step():
    scene = geometry("HashGridSpatialTime")
    moving = MovingParts(scene)
    static = {"encoding", "density_network", "feature_network"}
    moving.train(moves=False, is_video=False)
    assert training(scene) == static and scene.encoding.encoding.is_video is False
    moving.train(moves=True, is_video=True)
    assert training(scene) == static | {"encoding_time"}


def test_frozen_scenes_keep_their_motion():
    scene, background = geometry("HashGridSpatialTime"), threestudio.find("solid-color-background")
    background = background({"learned": True})
    moving = MovingParts(scene)
    moving.freeze_others((scene, background, None))
    assert training(scene) == {"encoding_time"} and training(background) == set()


def test_a_deformation_trains_its_field_only_once_the_scene_moves():
    scene = geometry("HashGridSpatialTimeDeform", **DEFORM)
    moving = MovingParts(scene)
    moving.freeze_others((scene,))
    assert training(scene) == {"encoding_time", "time_network"}


def test_what_does_not_move_has_no_moving_parts():
    assert not MovingParts(geometry("HashGridSpatialTime", static=True))
    still = MovingParts(geometry("HashGrid"))
    with pytest.raises(ValueError, match="freeze_static_modules is true, but no part of the geom"):
        still.freeze_others(())
    assert not MovingParts(object())
