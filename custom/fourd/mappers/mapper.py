"""The network that turns a control into words: base and bypass vectors for every layer and step.

A mapper is told three things: how noisy the image is, which cross-attention layer asks, and the
control itself (`control_inputs`). It returns two vectors for each layer and sample. The base takes
the place of a placeholder's token embedding; the bypass is added to what the text encoder makes of
that token (`text_injection`).

Dimensions: ``l`` layers, ``b`` samples, ``n_axes`` control numbers, ``h`` hidden units, ``d`` width
of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from threestudio.utils.rng import generator, rand_items
from torch import Tensor, nn

from custom.fourd.encoders.fourier_features import FourierFeatures, fourier_preset

from .control_inputs import ControlAxis, time_axes, view_axes

KINDS = ("time", "view", "joint")
OUTPUTS = ("both", "base", "bypass")
SCENE_CODE_SIZE = 64
_SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class MapperOutput:
    """What takes a placeholder's place; None where the mapper has no such head."""

    base: Float[Tensor, "l b d"] | None
    bypass: Float[Tensor, "l b d"] | None


@dataclass(frozen=True)
class MapperConfig:
    """What a mapper is, as its checkpoint records it."""

    kind: str = "time"
    """``time``, ``view``, or ``joint``: one token for both."""
    width: int = 768
    """Of the text encoder's tokens."""
    n_layers: int = 16
    """Cross-attention layers of the denoiser."""
    hidden: tuple[int, ...] = (128, 128, 128)
    """Units of each block of the trunk."""
    time_input: str = "both"
    """``absolute``, ``relative`` or ``both``."""
    time_distance: str = "signed"
    """``signed``, or ``unsigned``, which cannot tell after from before."""
    view_input: str = "both"
    """``absolute``, ``relative`` or ``both``."""
    view_relative: str = "rel_spherical"
    """The relative view parameterisation."""
    view_absolute: str = "abs_spherical"
    """The absolute view parameterisation."""
    encoding: str = "default"
    """A preset of the Fourier features; ``legacy_arch15`` hardly sees the diffusion step."""
    sigma_step: float | None = None
    """Replaces the preset's."""
    sigma_time: float | None = None
    """Replaces the preset's."""
    sigma_view: float | None = None
    """Replaces the preset's."""
    outputs: str = "both"
    """``both``, or ``base`` or ``bypass`` alone."""
    normalize_base: bool = True
    """Give the base the norm of the super-category's token embedding."""
    scene_features: int = 0
    """Width of pooled vision features of the condition frame, for many scenes; 0 for none."""
    nested_dropout: float = 0.0
    """Probability that a step drops the hidden units behind a random cut."""

    def axes(self) -> tuple[ControlAxis, ...]:
        """The control numbers, in the order in which the mapper wants them.

        Raises:
            ValueError: an unknown kind or parameterisation.
        """
        if self.kind not in KINDS:
            raise ValueError(f"the mapper is of kind {self.kind!r}; expected one of {KINDS}.")
        found: tuple[ControlAxis, ...] = ()
        if self.kind in ("view", "joint"):
            found += view_axes(self.view_input, self.view_relative, self.view_absolute)
        if self.kind in ("time", "joint"):
            found += time_axes(self.time_input, self.time_distance)
        return found


class Mapper(nn.Module):
    """Fourier features, a small trunk, and a linear head straight to the text encoder's width.

    Args:
        config: what it is.
        base_norm: norm of the super-category's token embedding, which the base is given.
        seed: of the fixed frequencies and the initial weights; None takes the experiment's.

    Initial weights are drawn from the stream (seed, "mapper-weights"), the frequencies from (seed,
    "mapper-frequencies"); torch's global generator is left alone.

    Raises:
        ValueError: settings out of range.
    """

    def __init__(self, config: MapperConfig, base_norm: float, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.axes = config.axes()
        _check_config(config, base_norm)
        self.register_buffer("base_norm", torch.tensor(float(base_norm)))
        self.register_buffer("axis_low", torch.tensor([axis.low for axis in self.axes]))
        self.register_buffer("axis_high", torch.tensor([axis.high for axis in self.axes]))
        preset = fourier_preset(config.encoding)
        families = ["step", "layer", *(axis.family for axis in self.axes)]
        replaced = {"step": config.sigma_step, "time": config.sigma_time, "view": config.sigma_view}
        self.encoder = FourierFeatures(
            [
                preset.sigma(family) if replaced.get(family) is None else replaced[family]
                for family in families
            ],
            preset.n_features,
            generator("mapper-frequencies", 0, seed=seed),
            preset.normalize,
        )
        # The modules would draw their weights from the global generator: it gets its state back.
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(generator("mapper-weights", 0, seed=seed).get_state())
            self._build()

    def _build(self) -> None:
        config = self.config
        n_inputs = self.encoder.n_features
        self.scene_code: nn.Linear | None = None
        if config.scene_features:
            self.scene_code = nn.Linear(config.scene_features, SCENE_CODE_SIZE)
            nn.init.zeros_(self.scene_code.weight)
            nn.init.zeros_(self.scene_code.bias)
            n_inputs += SCENE_CODE_SIZE
        blocks: list[nn.Module] = []
        for size in config.hidden:
            blocks += [nn.Linear(n_inputs, size), nn.LayerNorm(size), nn.LeakyReLU()]
            n_inputs = size
        self.trunk = nn.Sequential(*blocks)
        n_vectors = 2 if config.outputs == "both" else 1
        self.head = nn.Linear(n_inputs, n_vectors * config.width)

    @torch.no_grad()
    def set_ranges(self, values: Float[Tensor, "n n_axes"]) -> None:
        """Take the ranges of measured axes from control values of the training set.

        An axis along which they are all alike keeps the width of its range, centred on them.
        """
        for index, axis in enumerate(self.axes):
            if not axis.measured:
                continue
            low, high = values[:, index].min(), values[:, index].max()
            if high - low < 1e-6:
                middle, half = 0.5 * (low + high), 0.5 * (axis.high - axis.low)
                low, high = middle - half, middle + half
            self.axis_low[index], self.axis_high[index] = low, high

    def forward(
        self,
        noise_levels: Float[Tensor, "b"],
        controls: Float[Tensor, "b n_axes"],
        layers: Int[Tensor, "l"] | None = None,
        scene_features: Float[Tensor, "b f"] | None = None,
        cuts: Int[Tensor, "l b"] | int | None = None,
    ) -> MapperOutput:
        """Vectors for every layer and sample.

        Args:
            noise_levels: how noisy the images are, in [0, 1]: diffusion step / number of steps, or
                sigma of a flow.
            controls: of `control_inputs.control_values`, not scaled.
            layers: which layers; None for all of them, in execution order.
            scene_features: pooled vision features of the condition frame, where the config asks.
            cuts: hidden units from here on are zeroed: what `nested_cuts` drew for this step, or
                one number for everything, which trades fidelity for editability.
        """
        self._check_inputs(controls, scene_features)
        if layers is None:
            layers = torch.arange(self.config.n_layers, device=controls.device)
        n_layers, batch = len(layers), len(controls)
        span = self.axis_high - self.axis_low
        scaled = 2 * (controls.to(span) - self.axis_low) / span - 1
        inputs = torch.cat(
            (
                (2 * noise_levels.to(span) - 1).view(1, batch, 1).expand(n_layers, -1, -1),
                (2 * layers.to(span) / self.config.n_layers - 1)
                .view(-1, 1, 1)
                .expand(-1, batch, -1),
                scaled.expand(n_layers, -1, -1),
            ),
            dim=-1,
        )
        features = self.encoder(inputs)
        if self.scene_code is not None:
            code = self.scene_code(scene_features.to(span)).expand(n_layers, -1, -1)
            features = torch.cat((features, code), dim=-1)
        hidden = self.trunk(features)
        if cuts is not None:
            hidden = drop_behind(hidden, cuts)
        return self._split(self.head(hidden))

    def _split(self, vectors: Float[Tensor, "l b n"]) -> MapperOutput:
        width = self.config.width
        base = vectors[..., :width] if self.config.outputs != "bypass" else None
        bypass = vectors[..., -width:] if self.config.outputs != "base" else None
        if base is not None and self.config.normalize_base:
            norm = base.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)
            base = base * (self.base_norm / norm)
        return MapperOutput(base, bypass)

    def _check_inputs(self, controls: Tensor, scene_features: Tensor | None) -> None:
        if controls.shape[-1] != len(self.axes):
            names = ", ".join(axis.name for axis in self.axes)
            raise ValueError(
                f"controls has shape {tuple(controls.shape)}; expected (b, {len(self.axes)}): "
                f"{names}."
            )
        if (scene_features is None) != (self.scene_code is None):
            given, expected = ("no", "some") if scene_features is None else ("some", "none")
            raise ValueError(
                f"the mapper was given {given} scene_features; expected {expected}, as its config "
                f"has scene_features={self.config.scene_features}."
            )


def nested_cuts(
    config: MapperConfig, batch: int, step: int, first_item: int = 0
) -> Int[Tensor, "l b"] | None:
    """Where a training step cuts the hidden units, or None: nested dropout.

    One coin for the step; if it fires, every layer of every sample draws its own cut uniformly from
    0 (everything is dropped) to h - 1.

    Args:
        config: of the mapper; ``nested_dropout`` is the probability.
        batch: samples of this rank.
        step: global training step.
        first_item: global index of the first sample.

    Random: the streams (seed, "nested-dropout", step) and (seed, "nested-dropout-cut", step, item).
    """
    coin = torch.rand((), generator=generator("nested-dropout", step))
    if coin >= config.nested_dropout:
        return None
    drawn = rand_items((batch, config.n_layers), "nested-dropout-cut", step, first_item)
    return (drawn.T * config.hidden[-1]).long()


def drop_behind(
    hidden: Float[Tensor, "l b h"], cuts: Int[Tensor, "l b"] | int
) -> Float[Tensor, "l b h"]:
    """Zero the hidden units from index ``cuts`` on."""
    index = torch.arange(hidden.shape[-1], device=hidden.device)
    limits = torch.as_tensor(cuts, device=hidden.device).unsqueeze(-1)
    return hidden * (index < limits)


def exempt_from_decay(optimizer: torch.optim.Optimizer) -> None:
    """Split every parameter group, in place: no weight decay for norms and biases.

    Call it before a learning-rate schedule is built.
    """
    for group in list(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key != "params"}
        free = [parameter for parameter in group["params"] if parameter.ndim < 2]
        group["params"] = [parameter for parameter in group["params"] if parameter.ndim >= 2]
        if not free:
            continue
        if "name" in settings:
            settings["name"] += ".norms_and_biases"
        optimizer.add_param_group({**settings, "params": free, "weight_decay": 0.0})


def config_facts(config: MapperConfig) -> dict:
    """The config as JSON holds it."""
    return {**asdict(config), "hidden": list(config.hidden)}


def config_from_facts(facts: dict) -> MapperConfig:
    """The config that `config_facts` wrote.

    Raises:
        ValueError: it has keys that this version does not know.
    """
    unknown = sorted(set(facts) - set(MapperConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"the mapper's config has the unknown key {', '.join(unknown)}; expected keys of this "
            "version. It was written by a newer one: update threestudio-4d."
        )
    return MapperConfig(**{**facts, "hidden": tuple(facts.get("hidden", MapperConfig.hidden))})


def _check_config(config: MapperConfig, base_norm: float) -> None:
    if config.outputs not in OUTPUTS:
        raise ValueError(f"outputs is {config.outputs!r}; expected one of {', '.join(OUTPUTS)}.")
    if not config.hidden or _smallest(config.hidden, config.width, config.n_layers) < 1:
        raise ValueError(
            f"hidden is {list(config.hidden)}, width {config.width}, n_layers {config.n_layers}; "
            "expected at least one hidden block and sizes of 1 or more."
        )
    if not 0 <= config.nested_dropout <= 1:
        raise ValueError(
            f"nested_dropout is {config.nested_dropout}; expected a probability in [0, 1]."
        )
    if not base_norm > 0:
        raise ValueError(
            f"base_norm is {base_norm}; expected the positive norm of the super-category's token "
            "embedding."
        )


def _smallest(hidden: Sequence[int], *others: int) -> int:
    return min(*hidden, *others)
