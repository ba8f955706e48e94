from types import SimpleNamespace

import pytest
import torch
import trimesh
from threestudio.utils.mesh_files import write_obj
from threestudio.utils.saving import SaverMixin


@pytest.fixture
def mesh():
    return SimpleNamespace(
        v_pos=torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        t_pos_idx=torch.tensor([[0, 1, 2], [0, 2, 3]]),
        v_nrm=torch.tensor([[0.0, 0, 1]] * 4),
        v_tex=torch.tensor([[0.0, 0], [1, 0], [0.25, 0.75]]),
        t_tex_idx=torch.tensor([[0, 1, 2], [2, 1, 0]]),
        v_rgb=torch.tensor([[1.0, 0, 0]] * 4),
    )


def lines(path):
    return path.read_text().splitlines()


def test_positions_alone(mesh, tmp_path):
    write_obj(str(tmp_path / "a.obj"), mesh)
    assert lines(tmp_path / "a.obj") == ["v 0 0 0", "v 1 0 0", "v 0 1 0", "v 0 0 1", "f 1 2 3",
                                         "f 1 3 4"]


def test_everything_counts_from_one_and_flips_v(mesh, tmp_path):
    write_obj(str(tmp_path / "a.obj"), mesh, "a.mtl", True, True, True)
    written = lines(tmp_path / "a.obj")
    assert written[:3] == ["mtllib a.mtl", "g object", "usemtl default"]
    assert written[3] == "v 0 0 0 1 0 0"
    assert "vt 0.25 0.25" in written and "vn 0 0 1" in written
    assert written[-2:] == ["f 1/1/1 2/2/2 3/3/3", "f 1/3/1 3/2/3 4/1/4"]


def test_normals_without_texture_leave_a_gap(mesh, tmp_path):
    write_obj(str(tmp_path / "a.obj"), mesh, save_normal=True)
    assert lines(tmp_path / "a.obj")[-1] == "f 1//1 3//3 4//4"


def test_obj_with_material_is_read_back(mesh, tmp_path):
    saver = SaverMixin()
    saver.set_save_dir(tmp_path)
    paths = saver.save_obj("out/model.obj", mesh, save_mat=True, save_uv=True, save_normal=True,
                           map_Kd=torch.rand(4, 4, 3), map_Pr=torch.rand(4, 4))
    assert [path.rsplit("/", 1)[1] for path in paths] == [
        "texture_kd.jpg", "texture_roughness.jpg", "model.mtl", "model.obj"]
    material = (tmp_path / "out" / "model.mtl").read_text()
    assert "map_Kd texture_kd.jpg" in material and "map_Pr texture_roughness.jpg" in material
    read = trimesh.load(paths[-1], process=False)
    assert len(read.faces) == 2 and read.visual.uv is not None


def test_material_without_colour_texture_is_white(mesh, tmp_path):
    saver = SaverMixin()
    saver.set_save_dir(tmp_path)
    saver.save_obj("model.obj", mesh, save_mat=True)
    assert "Kd 1.0 1.0 1.0" in (tmp_path / "model.mtl").read_text()


def test_bare_meshes_by_trimesh(mesh, tmp_path):
    saver = SaverMixin()
    saver.set_save_dir(tmp_path)
    read = trimesh.load(saver.save_mesh("m.ply", mesh.v_pos, mesh.t_pos_idx), process=False)
    assert read.vertices.shape == (4, 3) and read.faces.tolist() == mesh.t_pos_idx.tolist()
