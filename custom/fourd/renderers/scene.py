"""A trained scene, as evaluation, export, editing and distillation see it.

`Scene` hides which system trained what: cameras and scene times go in, colour, alpha and depth
come out. `load_scene` builds one from a checkpoint or an exported scene file alone, without any
diffusion model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import threestudio
import torch
from jaxtyping import Float
from torch import Tensor, nn

from custom.fourd.ops.camera import camera_rays, intrinsics_from_fovy
from custom.fourd.renderers.scene_file import (
    PARTS,
    SUFFIX,
    SceneRecipe,
    read_scene_file,
    recipe_of,
    write_scene_file,
)


@dataclass
class SceneImages:
    """Renders of a scene, one per camera."""

    rgb: Float[Tensor, "b h w 3"]
    """Colour in [0, 1] over the background."""
    alpha: Float[Tensor, "b h w 1"]
    """Accumulated opacity in [0, 1]."""
    depth: Float[Tensor, "b h w 1"]
    """Expected Euclidean distance along the ray in scene units: the contract's depth divided by
    the opacity, 0 where the scene is empty."""


class Scene:
    """Geometry, material, background and renderer of a trained scene.

    `recipe` says how they are built, where that is known; `save` needs it.
    """

    def __init__(
        self,
        geometry: nn.Module,
        material: Any,
        background: Any,
        renderer: Any,
        recipe: SceneRecipe | None = None,
    ) -> None:
        self.geometry, self.material = geometry, material
        self.background, self.renderer = background, renderer
        self.recipe = recipe

    @property
    def device(self) -> torch.device:
        """Where the scene's parameters are."""
        return next(self.geometry.parameters()).device

    @torch.no_grad()
    def render(
        self,
        c2w: Float[Tensor, "b 4 4"],
        fovy: Float[Tensor, "b"],
        height: int,
        width: int,
        frame_times: Float[Tensor, "b"] | None = None,
        background: Float[Tensor, "3"] | None = None,
    ) -> SceneImages:
        """Images of the scene, without randomness.

        Args:
            c2w: camera-to-world matrices of the contract.
            fovy: vertical fields of view in radians.
            frame_times: scene time per camera in [0, 1]; None means 0.
            background: colour that replaces the scene's own background.

        The parts keep the training or evaluation mode that they were in.
        """
        intrinsics = intrinsics_from_fovy(fovy, height, width)
        return self.film(c2w, intrinsics, height, width, frame_times, background)

    @torch.no_grad()
    def film(
        self,
        c2w: Float[Tensor, "b 4 4"],
        intrinsics: Float[Tensor, "b 3 3"],
        height: int,
        width: int,
        frame_times: Float[Tensor, "b"] | None = None,
        background: Float[Tensor, "3"] | None = None,
        samples_per_axis: int | None = None,
    ) -> SceneImages:
        """Images by cameras that a field of view alone does not describe, without randomness.

        Args:
            intrinsics: pinhole matrices in pixels of this size.
            samples_per_axis: pixels are means of so many rays per axis, which smooths silhouettes
                as a real camera does; depth is that of what is opaque in them. None takes the
                renderer's own.
            c2w, frame_times, background: as in `render`.
        """
        device, rays = self.device, samples_per_axis or self.samples_per_axis
        c2w, finer = c2w.to(device), intrinsics.to(device, copy=True)
        finer[:, :2] *= rays
        rays_o, rays_d = camera_rays(c2w, finer, height * rays, width * rays)
        return self._render(rays_o, rays_d, c2w[:, :3, 3], frame_times, background, rays, c2w=c2w)

    @torch.no_grad()
    def render_rays(
        self,
        rays_o: Float[Tensor, "b h w 3"],
        rays_d: Float[Tensor, "b h w 3"],
        frame_times: Float[Tensor, "b"] | None = None,
        background: Float[Tensor, "3"] | None = None,
    ) -> SceneImages:
        """What single rays see.

        Args:
            rays_o: origins in the world; the first of each image is where its light stands.
            rays_d: unit directions in the world.
            frame_times, background: as in `render`.
        """
        rays_o, rays_d = rays_o.to(self.device), rays_d.to(self.device)
        return self._render(rays_o, rays_d, rays_o[:, 0, 0], frame_times, background)

    def _render(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        positions: Tensor,
        frame_times: Tensor | None,
        background: Tensor | None,
        rays_per_axis: int = 1,
        **extra: Tensor,
    ) -> SceneImages:
        if frame_times is not None:
            extra["frame_times"] = frame_times.to(rays_o.device)
        with _evaluating(self.geometry, self.material, self.background, self.renderer):
            out = self.renderer(rays_o=rays_o, rays_d=rays_d, light_positions=positions, **extra)
        names = ("opacity", "comp_rgb", "depth")
        opacity, rgb, depth = (_means(out[name], rays_per_axis) for name in names)
        if background is not None:
            foreground = _means(out["comp_rgb_fg"], rays_per_axis)
            rgb = foreground + (1 - opacity) * background.to(rgb)
        depth = depth / opacity.clamp_min(1e-5) * (opacity > 1e-3)
        return SceneImages(rgb.clamp(0, 1), opacity.clamp(0, 1), depth)

    @property
    def samples_per_axis(self) -> int:
        """Rays per axis of a pixel, as the renderer's config says; 1 for foreign renderers."""
        return int(getattr(getattr(self.renderer, "cfg", None), "samples_per_axis", 1))

    def save(self, path: str | Path) -> None:
        """Write the scene to a `.safetensors` file that `load_scene` reads back to the same bits.

        Raises:
            ValueError: another suffix, or a scene that does not know how it was built.
            OSError: the file cannot be written.
        """
        if Path(path).suffix != SUFFIX:
            raise ValueError(f"{path} has another suffix; expected a name with {SUFFIX}.")
        if self.recipe is None:
            raise ValueError(
                "this scene does not know the config that it was built from; expected one of "
                "load_scene, or Scene(..., recipe=recipe_of(system_config, global_step))."
            )
        write_scene_file(path, {name: getattr(self, name) for name in PARTS}, self.recipe)


def _means(images: Float[Tensor, "b hk wk c"], k: int) -> Float[Tensor, "b h w c"]:
    """Means of k x k blocks."""
    if k == 1:
        return images
    return images.unflatten(2, (-1, k)).unflatten(1, (-1, k)).mean(dim=(2, 4))


class _evaluating:
    """Switches modules to evaluation and back to what they were."""

    def __init__(self, *modules: Any) -> None:
        self.modules = [module for module in modules if isinstance(module, nn.Module)]

    def __enter__(self) -> None:
        self.modes = [module.training for module in self.modules]
        for module in self.modules:
            module.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in zip(self.modules, self.modes, strict=True):
            module.train(mode)


def load_scene(path: str | Path, device: torch.device | None = None) -> Scene:
    """The scene that a file holds, ready to render.

    Args:
        path: a checkpoint written by one of our systems; an upstream checkpoint that lies in its
            run folder (beside `configs/parsed.yaml`); or a `.safetensors` scene file of `--export`
            or `Scene.save`.
        device: where to put it; None keeps it on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, unsafe, or carries no config to rebuild the scene from.
    """
    path = Path(path)
    state, recipe = read_scene_file(path) if path.suffix == SUFFIX else _read_checkpoint(path)
    built = {name: _build(recipe.system, name) for name in ("geometry", "material", "background")}
    renderer = threestudio.find(recipe.system["renderer_type"])(recipe.system["renderer"], **built)
    for name, part in (*built.items(), ("renderer", renderer)):
        _load_part(part, name, state, path)
        part.do_update_step(0, recipe.global_step, on_load_weights=True)
        part.eval()
        if device is not None:
            part.to(device)
    return Scene(renderer=renderer, recipe=recipe, **built)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], SceneRecipe]:
    from threestudio.utils.checkpoint import load_checkpoint

    data = load_checkpoint(path)
    system = _system_config(data, path)
    prompt = (system.get("prompt_processor") or {}).get("prompt", "")
    step, profile = int(data.get("global_step", 0)), str(data.get("profile", ""))
    return data["state_dict"], recipe_of(system, step, prompt, profile)


def _load_part(part: nn.Module, name: str, state: dict[str, Tensor], path: Path) -> None:
    """Give a part its weights; buffers that an upstream file lacks keep their values."""
    prefix = f"{name}."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    missing = [key for key, _ in part.named_parameters() if key not in own]
    if missing:
        raise ValueError(
            f"{path} has no weights for {', '.join(prefix + key for key in missing)}; its config "
            "and its weights do not belong together. Take the checkpoint as training wrote it."
        )
    part.load_state_dict(own, strict=False)


def _build(system: dict, name: str) -> Any:
    return threestudio.find(system[f"{name}_type"])(system[name])


def _system_config(data: dict, path: Path) -> dict:
    if "config" in data:
        return data["config"]["system"]
    beside = path.parent.parent / "configs" / "parsed.yaml"
    if not beside.exists():
        raise ValueError(
            f"{path} carries no config and {beside} does not exist; a scene can be rebuilt from a "
            "checkpoint of this project, or from one that still lies in its run folder."
        )
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(beside).system, resolve=True)
