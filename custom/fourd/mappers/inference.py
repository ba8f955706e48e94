"""Time and view control of one image, in a few lines.

    from custom.fourd.mappers.inference import load_controls, orbit_views

    controls = load_controls(["time-mapper-step-2000", "view-mapper-step-2000"])
    images = controls.generate(
        image,                                  # [H, W, 3] in [0, 1]
        times=[0.0, 0.25, 0.5, 0.75],
        views=orbit_views([0.0, 45.0, 90.0]),
        prompt="a red cube bouncing",
        seed=0,
    )                                           # [T, V, H, W, 3]

The systems of training and test sample with the same object.

Dimensions: ``b`` cells, ``t`` times, ``v`` views, ``h w`` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from threestudio.utils.rng import generator
from torch import Tensor, nn

from custom.fourd.diffusion.image_prior import ImagePrior, load_image_prior
from custom.fourd.ops.camera import camera_from_orbit

from .checkpoint import MapperFacts, check_fits, load_mapper
from .composition import Composition
from .control_inputs import Camera
from .control_sampling import SamplingOptions, mapper_speech, sample_controlled
from .controlled_prior import ControlledPrior, ImagePromptConfig
from .mapper import Mapper
from .prompt_templates import fill_template


class TimeViewControls:
    """A frozen image model with its mappers.

    Args:
        model: the frozen model.
        mappers: by kind: "time", "view", both, or "joint".
        template: of prompts, with {caption} or {noun}.
        sampling: steps and scales that are used where a call names none.

    Raises:
        ValueError: mappers that the model's composition cannot join.
    """

    def __init__(
        self,
        model: ControlledPrior,
        mappers: Mapping[str, Mapper],
        template: str = "a photo of {caption}",
        sampling: SamplingOptions | None = None,
    ) -> None:
        check_composition(model.composition, list(mappers.keys()))
        self.model, self.mappers = model, mappers
        self.template = template
        self.sampling = sampling or SamplingOptions()

    @property
    def follows_time(self) -> bool:
        """Whether a mapper is told the time."""
        return "time" in self.mappers or "joint" in self.mappers

    @property
    def follows_view(self) -> bool:
        """Whether a mapper is told the view."""
        return "view" in self.mappers or "joint" in self.mappers

    @torch.no_grad()
    def generate(
        self,
        image: Float[Tensor, "h w 3"],
        times: Sequence[float] | Float[Tensor, "t"],
        views: Camera,
        prompt: str = "",
        seed: int = 0,
        source_time: float = 0.0,
        source_view: Camera | None = None,
        batch_size: int = 16,
        sampling: SamplingOptions | None = None,
    ) -> Float[Tensor, "t v h w 3"]:
        """Images of the scene at every time and from every view, each made from ``image`` alone.

        All cells start from the same noise; none is made from another.

        Args:
            image: the reference, in [0, 1]; square images lose nothing to the vision encoder. The
                model's autoencoder must divide its size.
            times: scene times in [0, 1].
            views: cameras, see `orbit_views`: ``c2w`` [v 4 4], ``fovy`` [v] in radians,
                ``elevation`` and ``azimuth`` [v] in degrees, ``radius`` [v] in scene units.
            prompt: the scene in words; put into the template.
            seed: of the noise, from the role "mapper-sample".
            source_time: scene time of ``image``.
            source_view: its camera, one row; None takes the first of ``views``.
            batch_size: cells at a time; changes nothing but memory and rounding.
            sampling: steps and scales; None takes the object's own.

        Returns:
            Images in [0, 1] on the CPU.

        Raises:
            ValueError: a shape or value that does not fit.
        """
        times = torch.as_tensor(times, dtype=torch.float32).flatten()
        self._check(image, times, views)
        n_times, n_views = len(times), len(views["azimuth"])
        source = {key: value[:1] for key, value in (source_view or views).items()}
        cells = [
            (t, v) for t in range(n_times) for v in range(n_views)
        ]  # fmt: skip
        noise = self.noise(image, seed)
        made = []
        for first in range(0, len(cells), batch_size):
            part = cells[first : first + batch_size]
            n, time_ids = len(part), [t for t, _ in part]
            view_ids = [v for _, v in part]
            batch = {
                "cond_rgb": image.expand(n, *image.shape),
                "caption": [prompt] * n,
                "time_i": torch.full((n,), float(source_time)),
                "time_j": times[time_ids],
                "camera_a": {k: v.expand(n, *v.shape[1:]) for k, v in source.items()},
                "camera_b": {key: value[view_ids] for key, value in views.items()},
            }
            made.append(self.sample(batch, noise.expand(n, *noise.shape[1:]), sampling).cpu())
        return torch.cat(made).unflatten(0, (n_times, n_views))

    def sample(
        self,
        batch: Mapping[str, Any],
        noise: Float[Tensor, "b c lh lw"],
        sampling: SamplingOptions | None = None,
        with_image: bool = True,
        with_control: bool = True,
    ) -> Float[Tensor, "b h w 3"]:
        """Images of the targets that a batch of the pair source asks for.

        Args:
            batch: ``cond_rgb``, ``caption``, ``time_i``, ``time_j``, ``camera_a``, ``camera_b``.
            noise: where sampling starts.
            sampling: steps and scales.
            with_image: False drops the image prompt. with_control: False drops the controls.
        """
        batch = self.model.with_scene_features(on_device(batch, self.model.device), self.mappers)
        texts = [fill_template(self.template, caption) for caption in batch["caption"]]
        speech = rest = None
        if with_control:
            speech, rest = mapper_speech(self.model, self.mappers, batch)
        noise = noise.to(self.model.device)
        sampling = sampling or self.sampling
        return sample_controlled(
            self.model, batch, texts, noise, speech, rest, sampling, with_image
        )

    def noise(self, image: Float[Tensor, "*rest h w 3"], seed: int = 0) -> Tensor:
        """Where the sampling of an image's size starts, [1 c lh lw].

        Random from the role "mapper-sample".
        """
        rgb = image.reshape(-1, *image.shape[-3:])[:1].to(self.model.device)
        shape = self.model.prior.encode(rgb).shape
        stream = generator("mapper-sample", 0, seed=seed)
        return torch.randn(shape, generator=stream).to(self.model.device)

    def _check(self, image: Tensor, times: Tensor, views: Camera) -> None:
        if image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"image has shape {tuple(image.shape)}; expected (height, width, 3), colours in "
                "[0, 1]."
            )
        if not len(times) or not bool(((times >= 0) & (times <= 1)).all()):
            raise ValueError(
                f"times are {times.tolist()}; expected scene times in [0, 1], at least one."
            )
        missing = [k for k in ("c2w", "fovy", "elevation", "azimuth", "radius") if k not in views]
        if missing:
            raise ValueError(
                f"views lack {', '.join(missing)}; expected cameras as orbit_views makes them."
            )


def orbit_views(
    azimuths_deg: Sequence[float],
    elevation_deg: float = 15.0,
    radius: float = 3.0,
    fovy_deg: float = 40.0,
) -> dict[str, Tensor]:
    """Cameras around the scene, all at one height; the defaults are the pair source's.

    Args:
        azimuths_deg: directions in degrees.
        elevation_deg: height over the horizon in degrees.
        radius: distance from the origin in scene units.
        fovy_deg: vertical field of view in degrees.
    """
    azimuth = torch.as_tensor(azimuths_deg, dtype=torch.float32).flatten()
    elevation = torch.full_like(azimuth, float(elevation_deg))
    return {
        "c2w": camera_from_orbit(elevation, azimuth, float(radius)),
        "fovy": torch.full_like(azimuth, math.radians(fovy_deg)),
        "elevation": elevation,
        "azimuth": azimuth,
        "radius": torch.full_like(azimuth, float(radius)),
    }


def load_controls(
    mappers: Sequence[str | Path],
    prior: str | ImagePrior | None = None,
    ip_adapter: Mapping[str, Any] | None = None,
    compose: Mapping[str, Any] | str = "tokens",
    sampling: SamplingOptions | None = None,
    device: torch.device | None = None,
) -> TimeViewControls:
    """Load trained mappers and the model that they were trained on.

    Args:
        mappers: files that `save_mapper` wrote, either of each pair; one of each kind.
        prior: id, folder or embedded:// name of the image model, or the model; None takes the one
            that the mappers name. An `ImagePrior` gets new attention processors.
        ip_adapter: keys of `ImagePromptConfig`; None takes what the mappers name.
        compose: a mode, or keys of `Composition`. A joint mapper is always "joint_token".
        sampling: steps and scales; None takes those that the mappers were tested with.
        device: where everything goes; None leaves it where torch creates tensors.

    Raises:
        FileNotFoundError: a mapper's file is missing.
        ModelUnavailableError: a model cannot be had.
        ValueError: mappers of different models, two of one kind, or files that do not fit.
    """
    loaded = [load_mapper(path) for path in mappers]
    facts = _agreed(loaded)
    kinds = [mapper.config.kind for mapper, _ in loaded]
    keys = {"mode": compose} if isinstance(compose, str) else dict(compose)
    composition = Composition(**keys)
    if kinds == ["joint"]:
        composition = replace(composition, mode="joint_token")
    check_composition(composition, kinds)
    if not isinstance(prior, ImagePrior):
        same = prior is None or prior == facts.base_model
        revision = facts.base_revision if same else None
        prior = load_image_prior(prior or facts.base_model, revision, device)
    adapter = ImagePromptConfig.of(ip_adapter) or facts.image_prompt()
    model = ControlledPrior(prior, adapter, composition, facts.injection)
    for _, each in loaded:
        check_fits(each, prior.name, model.injection.width, model.table)
    found = nn.ModuleDict({kind: m for kind, (m, _) in zip(kinds, loaded, strict=True)})
    chosen = sampling or SamplingOptions(**(facts.sampling or {}))
    return TimeViewControls(model, found.to(model.device), facts.text_template(), chosen)


def check_composition(composition: Composition, kinds: Sequence[str]) -> None:
    """Refuse mappers that a composition cannot join.

    Raises:
        ValueError: two of one kind, a joint mapper beside others, or one mapper where two speak.
    """
    fit = {
        "joint_token": (["joint"],),
        "tokens": (["time"], ["view"], ["time", "view"]),
    }.get(composition.mode, (["time", "view"],))
    if sorted(kinds) not in fit:
        expected = " or ".join(" and ".join(each) for each in fit)
        raise ValueError(
            f"compose is {composition.mode!r} and the mappers are {', '.join(kinds) or 'none'}; "
            f"expected {expected}."
        )


def _agreed(loaded: Sequence[tuple[Mapper, MapperFacts]]) -> MapperFacts:
    if not loaded:
        raise ValueError("no mapper is named; expected the file of one, or of a time and a view.")
    first = loaded[0][1]
    for key in ("base_model", "injection", "prompt_template"):
        values = [getattr(facts, key) for _, facts in loaded]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"the mappers were trained with different {key}: {values[0]} and "
                f"{next(v for v in values if v != values[0])}; expected the same. Train one again."
            )
    return first


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors, those of its cameras included, on a device."""
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Tensor):
            moved[key] = value.to(device)
        elif isinstance(value, Mapping):
            moved[key] = on_device(value, device)
        else:
            moved[key] = value
    return moved
