"""A scene in one file: the same bits in another process, and refusals of what is no scene."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.renderers.scene import Scene, load_scene
from custom.fourd.renderers.scene_file import recipe_of
from tests.fixtures.launched import ROOT
from tests.fixtures.tiny_scenes import SYSTEM, cameras, random_scene

FRESH = """
import sys
import torch
import custom.fourd
from custom.fourd.renderers.scene import load_scene
given = torch.load(sys.argv[2] + "/views.pt", weights_only=True)
images = load_scene(sys.argv[1]).render(*given["c2w_fovy"], 9, 11, given["times"])
torch.save(vars(images), sys.argv[2] + "/images.pt")
heavy = ("diffusers", "transformers", "pytorch_lightning")
print([name for name in heavy if name in sys.modules])
"""


def images_of(scene):
    c2w, fovy, times = cameras()
    return vars(scene.render(c2w, fovy, 9, 11, times))


def test_a_fresh_process_renders_the_same_bits(tmp_path):
    scene = random_scene()
    scene.save(tmp_path / "scene.safetensors")
    c2w, fovy, times = cameras()
    torch.save({"c2w_fovy": (c2w, fovy), "times": times}, tmp_path / "views.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "scene.safetensors"), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    there, here = torch.load(tmp_path / "images.pt", weights_only=True), images_of(scene)
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert here["alpha"].max() > 0.5, "the test would show nothing of an empty scene"
    assert done.stdout.split("\n")[-2] == "[]"


def test_the_step_of_a_schedule_comes_along(tmp_path):
    """At step 7 of 10 the blob is 0.5 + 0.7 * 0.4 wide."""
    random_scene().save(tmp_path / "a.safetensors")
    loaded = load_scene(tmp_path / "a.safetensors")
    assert loaded.geometry.density_blob_std == pytest.approx(0.78)
    assert (loaded.recipe.global_step, loaded.recipe.prompt) == (7, "a <ball> & a cube")
    assert loaded.recipe.profile == "test"


def test_another_reader_finds_tensors_and_config(tmp_path):
    scene = random_scene()
    scene.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o044, "readable like other files"
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        names, metadata = set(file.keys()), file.metadata()
    expected = {f"geometry.{key}" for key in scene.geometry.state_dict()}
    assert expected <= names and "renderer.estimator.binaries" in names
    written = json.loads(metadata["threestudio-4d scene"])
    assert written["system"]["renderer"] == {"num_samples_per_ray": 24}
    assert written["system"]["geometry_type"] == "implicit-volume"


def test_a_loaded_scene_saves_itself_again(tmp_path):
    random_scene().save(tmp_path / "a.safetensors")
    load_scene(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_recipe_names_no_file_of_this_machine():
    system = SYSTEM | {
        "geometry": SYSTEM["geometry"] | {"weights": "/somewhere/secret.ckpt:geometry"},
        "guidance": {"pretrained_model_name_or_path": "/somewhere/model"},
    }
    recipe = recipe_of(system, 3)
    assert "/somewhere" not in json.dumps(recipe.system)
    assert set(recipe.system) == set(SYSTEM)


def test_saving_refuses_what_could_not_be_read_again(tmp_path):
    scene = random_scene()
    with pytest.raises(ValueError, match="scene.pt has another suffix; expected .*.safetensors"):
        scene.save(tmp_path / "scene.pt")
    bare = Scene(scene.geometry, scene.material, scene.background, scene.renderer)
    with pytest.raises(ValueError, match="does not know the config"):
        bare.save(tmp_path / "scene.safetensors")


def test_what_is_no_scene_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="a.safetensors does not exist"):
        load_scene(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="holds no scene"):
        load_scene(path)

    def write(text):
        save_file({"x": torch.ones(2)}, path, {"threestudio-4d scene": text})

    write('{"version": 2}')
    with pytest.raises(ValueError, match="scene of version 2; this program reads version 1"):
        load_scene(path)
    for text in ("{", "[]", '{"version": 1, "system": {}, "colour": 1}',
                 '{"version": 1, "system": []}', "{}"):  # fmt: skip
        write(text)
        with pytest.raises(ValueError, match="metadata of .* is damaged"):
            load_scene(path)
    write('{"version": 1, "system": {"geometry_type": "implicit-volume"}}')
    with pytest.raises(ValueError, match="lacks material_type, background_type, renderer_type"):
        load_scene(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    random_scene().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_scene(path)
    path.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_scene(path)


def test_missing_weights_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    random_scene().save(path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    del tensors["geometry.density_network.layers.0.weight"]
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="no weights for geometry.density_network.layers.0.weight"):
        load_scene(path)
