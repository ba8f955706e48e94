"""Wavefront OBJ files from a mesh."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from threestudio.utils.image_grid import to_numpy


def write_obj(
    path: str,
    mesh: Any,
    material: str | None = None,
    save_normal: bool = False,
    save_uv: bool = False,
    save_vertex_color: bool = False,
) -> None:
    """Write ``mesh`` to ``path``.

    Faces are ``v/vt/vn``; normals share the index of their vertex. OBJ counts from 1, and its v
    axis points up, so v becomes 1 - v.

    Args:
        path: the file.
        mesh: has ``v_pos`` [V, 3] and ``t_pos_idx`` [T, 3], and, as asked for, ``v_nrm`` [V, 3],
            ``v_tex`` [U, 2] with ``t_tex_idx`` [T, 3], ``v_rgb`` [V, 3] in [0, 1].
        material: name of the .mtl file beside it.
        save_normal, save_uv, save_vertex_color: what to write beside positions.
    """
    v_pos, faces = to_numpy(mesh.v_pos), to_numpy(mesh.t_pos_idx)
    lines: list[str] = []
    if material is not None:
        lines += [f"mtllib {material}", "g object", "usemtl default"]
    if save_vertex_color:
        v_pos = np.concatenate([v_pos, to_numpy(mesh.v_rgb)], axis=1)
    lines += _rows("v", v_pos)
    columns = [faces + 1]
    if save_uv:
        uv = to_numpy(mesh.v_tex) * [1.0, -1.0] + [0.0, 1.0]
        lines += _rows("vt", uv)
        columns.append(to_numpy(mesh.t_tex_idx) + 1)
    if save_normal:
        lines += _rows("vn", to_numpy(mesh.v_nrm))
        columns += [None] * (2 - len(columns)) + [faces + 1]
    for index in range(len(faces)):
        corners = ("/".join("" if column is None else str(int(column[index, corner]))
                            for column in columns) for corner in range(3))
        lines.append("f " + " ".join(corners))
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _rows(key: str, values: np.ndarray) -> Iterable[str]:
    return (f"{key} " + " ".join(f"{value:.6g}" for value in row) for row in values)
