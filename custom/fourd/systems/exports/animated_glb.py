"""Meshes over time as one binary glTF 2.0 file (`.glb`) that plays in any viewer.

The surface is cut out of a density at every time anew, so its topology differs from time to time.
Morph targets move the vertices of one fixed mesh and cannot show that (nor does a deformation
encoding help: it leads from a moving point back to the scene at rest, not forth). So every time is
a node with its own mesh, and an animation shows one node at a time by its scale: 1 or 0, with STEP
interpolation. Core glTF 2.0 has this way in its text ("when the scale is zero on all three axes,
implementations are free to optimize away rendering"), while `KHR_node_visibility` is known to few
viewers. A viewer that plays no animation shows the first time.

Vertices are in the scene's units and axes (z up, front towards +x); the root node turns them to
glTF's (y up, front towards +z). Colours are what the renders show, shading included, hence the
material is unlit; glTF's vertex colours are linear, so they are converted from sRGB.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from threestudio.models.mesh import Mesh

# (x, y, z) -> (y, z, x), a turn by 120 degrees about (1, 1, 1), as a quaternion (x, y, z, w).
Z_UP_TO_Y_UP = [-0.5, -0.5, -0.5, 0.5]
FLOAT, UNSIGNED_SHORT, UNSIGNED_INT = 5126, 5123, 5125
ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963
MAGIC, JSON_CHUNK, BIN_CHUNK = 0x46546C67, 0x4E4F534A, 0x004E4942


def animated_glb(
    meshes: Sequence[Mesh | None], seconds: float, extras: dict[str, Any] | None = None
) -> bytes:
    """The bytes of a `.glb` that shows one mesh after the other, each equally long.

    Args:
        meshes: one per time, in order; None shows nothing. Vertex colours, where a mesh has them,
            are sRGB in [0, 1]. A single mesh makes a file without animation.
        seconds: length of the animation.
        extras: facts for whoever reads the file, plain JSON values.

    Raises:
        ValueError: no mesh at all, or no positive length.
    """
    if not any(mesh is not None for mesh in meshes):
        raise ValueError("there is no mesh to write; expected at least one time with a surface.")
    if seconds <= 0:
        raise ValueError(f"the animation lasts {seconds} s; expected more than 0.")
    file = _Builder(extras or {})
    for index, mesh in enumerate(meshes):
        file.add_frame(mesh, index, shown_at_rest=index == 0 or len(meshes) == 1)
    if len(meshes) > 1:
        file.animate(len(meshes), seconds)
    return file.to_bytes()


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """Display values in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


class _Builder:
    """Collects the JSON and the binary part of one file."""

    def __init__(self, extras: dict[str, Any]) -> None:
        self.data = bytearray()
        self.json: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "threestudio-4d", "extras": extras},
            "extensionsUsed": ["KHR_materials_unlit"],
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"name": "scene", "rotation": Z_UP_TO_Y_UP, "children": []}],
            "meshes": [],
            "materials": [
                {
                    "name": "vertex colours",
                    "doubleSided": True,
                    "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0},
                    "extensions": {"KHR_materials_unlit": {}},
                }
            ],
            "accessors": [],
            "bufferViews": [],
        }

    def add_frame(self, mesh: Mesh | None, index: int, shown_at_rest: bool) -> None:
        node: dict[str, Any] = {"name": f"time {index}"}
        if not shown_at_rest:
            node["scale"] = [0.0, 0.0, 0.0]
        if mesh is not None:
            node["mesh"] = self._add_mesh(mesh, index)
        self.json["nodes"][0]["children"].append(len(self.json["nodes"]))
        self.json["nodes"].append(node)

    def _add_mesh(self, mesh: Mesh, index: int) -> int:
        positions = mesh.v_pos.detach().cpu().numpy().astype("<f4")
        faces = mesh.t_pos_idx.detach().cpu().numpy()
        attributes = {"POSITION": self._add(positions, "VEC3", ARRAY_BUFFER, limits=True)}
        if mesh.v_rgb is not None:
            linear = srgb_to_linear(mesh.v_rgb.detach().cpu().numpy().clip(0, 1))
            # Four components keep every vertex on a multiple of four bytes.
            rgba = np.concatenate([linear, np.ones_like(linear[:, :1])], axis=1)
            shorts = np.round(rgba * 65535).astype("<u2")
            attributes["COLOR_0"] = self._add(shorts, "VEC4", ARRAY_BUFFER, normalized=True)
        kind = "<u2" if len(positions) < 65535 else "<u4"
        indices = self._add(faces.reshape(-1).astype(kind), "SCALAR", ELEMENT_ARRAY_BUFFER)
        primitive = {"attributes": attributes, "indices": indices, "material": 0}
        self.json["meshes"].append({"name": f"time {index}", "primitives": [primitive]})
        return len(self.json["meshes"]) - 1

    def animate(self, n_frames: int, seconds: float) -> None:
        """Frame k is shown from k / n to (k + 1) / n of the length; the last holds to the end."""
        key_times = (np.arange(n_frames + 1) * (seconds / n_frames)).astype("<f4")
        at = self._add(key_times, "SCALAR", None, limits=True)
        samplers, channels = [], []
        for index in range(n_frames):
            scales = np.zeros((n_frames + 1, 3), "<f4")
            scales[index] = 1.0
            if index == n_frames - 1:
                scales[-1] = 1.0
            output = self._add(scales, "VEC3", None)
            samplers.append({"input": at, "output": output, "interpolation": "STEP"})
            target = {"node": self.json["nodes"][0]["children"][index], "path": "scale"}
            channels.append({"sampler": index, "target": target})
        self.json["animations"] = [{"name": "motion", "samplers": samplers, "channels": channels}]

    def _add(
        self,
        values: np.ndarray,
        kind: str,
        target: int | None,
        limits: bool = False,
        normalized: bool = False,
    ) -> int:
        """Append an array as a view and an accessor of its own; returns the accessor."""
        types = {"f": FLOAT, "u": UNSIGNED_SHORT if values.dtype.itemsize == 2 else UNSIGNED_INT}
        raw = np.ascontiguousarray(values).tobytes()
        view: dict[str, Any] = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(raw)}
        if target is not None:
            view["target"] = target
        self.data += raw + b"\0" * (-len(raw) % 4)
        accessor: dict[str, Any] = {
            "bufferView": len(self.json["bufferViews"]),
            "componentType": types[values.dtype.kind],
            "count": len(values),
            "type": kind,
        }
        if normalized:
            accessor["normalized"] = True
        if limits:
            rows = values.reshape(len(values), -1)
            accessor["min"] = [float(value) for value in rows.min(axis=0)]
            accessor["max"] = [float(value) for value in rows.max(axis=0)]
        self.json["bufferViews"].append(view)
        self.json["accessors"].append(accessor)
        return len(self.json["accessors"]) - 1

    def to_bytes(self) -> bytes:
        self.json["buffers"] = [{"byteLength": len(self.data)}]
        text = json.dumps(self.json, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        total = 12 + 8 + len(text) + 8 + len(self.data)
        head = struct.pack("<III", MAGIC, 2, total)
        json_head = struct.pack("<II", len(text), JSON_CHUNK)
        return head + json_head + text + struct.pack("<II", len(self.data), BIN_CHUNK) + self.data
