"""What the systems of time and view control are made of: the frozen model and its mappers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import threestudio
from threestudio.systems.base import BaseSystem
from threestudio.utils.misc import get_device
from threestudio.utils.pretrained import RequiredModel
from torch import nn

from custom.fourd.diffusion.image_prior import IMAGE_COMPONENTS, ImagePrior, load_image_prior
from custom.fourd.mappers.checkpoint import MapperFacts, check_fits, load_mapper, save_mapper
from custom.fourd.mappers.composition import PLACEHOLDERS, Composition
from custom.fourd.mappers.control_sampling import SamplingOptions
from custom.fourd.mappers.controlled_prior import ControlledPrior, ImagePromptConfig
from custom.fourd.mappers.inference import TimeViewControls, check_composition
from custom.fourd.mappers.mapper import Mapper, MapperConfig
from custom.fourd.mappers.prompt_templates import checked_templates
from custom.fourd.mappers.text_injection import InjectionConfig

Settings = TypeVar("Settings")


class MapperSetup(BaseSystem):
    """Loads the model and builds the mappers named by `controls`."""

    controls: tuple[str, ...] = ()
    """kinds of mappers; a registered system says which"""
    strict_optimizer_groups = True
    weights_keys = ("weights", "mapper_weights")

    @dataclass
    class Config(BaseSystem.Config):
        base_model: str = "embedded://multiview"
        """Frozen image model: id, folder or embedded://name"""
        revision: str | None = None
        """commit of base_model, if that is an id"""
        ip_adapter: dict | None = None
        """null, or {weights: file, image_encoder: folder or id, image_encoder_folder, scale}"""
        mapper: dict = field(default_factory=dict)
        """keys of `MapperConfig` but for kind, width and n_layers"""
        mapper_weights: list = field(default_factory=list)
        """mappers to start from, files as training writes them, one of each kind at most; the rest
        of the kinds start fresh. What they are is taken from the files, not from `mapper`"""
        mapper_weights_lr: float = 0.1
        """factor on the learning rates where training starts from mapper_weights"""
        injection: dict = field(default_factory=dict)
        """keys of `InjectionConfig`"""
        compose: dict = field(default_factory=dict)
        """keys of `Composition`: mode tokens, joint_token, attention or guidance, time_weight,
        view_weight. Training joins attention's and guidance's controls as tokens does"""
        prompt_template: str = "a photo of {caption}"
        """what follows the placeholders, with the pair's {caption} or {noun}: without article"""
        training_templates: Any = None
        """templates that training draws from for each pair: a list, or imagenet for the 27 neutral
        ones; null takes prompt_template"""
        drop_control: float = 0.075
        """share of pairs that see the super-categories in place of the controls"""
        drop_image: float = 0.05
        """share of pairs that see no image prompt"""
        foreground_weight: float = 0.0
        """w: the loss of a latent counts 1 + w * alpha of the target"""
        sampling_steps: int = 20
        """calls of the denoiser for one image"""
        image_scale: float = 3.0
        """guidance by the image prompt"""
        control_scale: float = 4.5
        """guidance by the controls"""
        grid: dict = field(default_factory=dict)
        """keys of `GridOptions`: the time x view grids that the test writes"""
        evaluation: dict = field(default_factory=dict)
        """keys of `EvaluationOptions`: what the test compares with"""

    cfg: Config

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the folders that a system of this configuration loads."""
        name = cfg.get("base_model") or cls.Config.base_model
        models = [RequiredModel(name, IMAGE_COMPONENTS, cfg.get("revision"))]
        adapter = ImagePromptConfig.of(cfg.get("ip_adapter"))
        return models + (adapter.required_models() if adapter else [])

    def configure(self) -> None:
        """Load the frozen model and build the mappers.

        Raises:
            ModelUnavailableError: a model cannot be had.
            ValueError: keys that do not fit the model.
        """
        cfg = self.cfg
        self._check_templates()
        self.configure_evaluation()
        composition = checked_keys(Composition, cfg.compose, "system.compose")
        self.controls = self.controls_of(composition)
        injection = checked_keys(InjectionConfig, cfg.injection, "system.injection")
        check_composition(composition, self.controls)
        prior = load_image_prior(cfg.base_model, cfg.revision, get_device())
        self.model = ControlledPrior(prior, cfg.ip_adapter, composition, injection)
        self.mappers = nn.ModuleDict({kind: self._build_mapper(kind) for kind in self.controls})
        self._loaded_kinds: set[str] = set()
        for path in cfg.mapper_weights:
            self._start_from(path)
        self.steering = TimeViewControls(
            self.model,
            self.mappers,
            cfg.prompt_template,
            SamplingOptions(cfg.sampling_steps, cfg.image_scale, cfg.control_scale),
        )

    def configure_evaluation(self) -> None:
        """Read what the evaluation is asked for; called before any model is loaded."""

    def controls_of(self, composition: Composition) -> tuple[str, ...]:
        """Kinds of mappers that a composition needs; `controls` for all but one that joins both."""
        return self.controls

    @property
    def prior(self) -> ImagePrior:
        """The frozen image model."""
        return self.model.prior

    def _check_templates(self) -> None:
        cfg = self.cfg
        checked_templates(cfg.prompt_template, "system.prompt_template")
        given = cfg.training_templates or cfg.prompt_template
        self.training_templates = checked_templates(given, "system.training_templates")

    def _build_mapper(self, kind: str) -> Mapper:
        given = {**self.cfg.mapper}
        if "hidden" in given:
            given["hidden"] = tuple(given["hidden"])
        width, n_layers = self.model.injection.width, len(self.model.table)
        try:
            config = MapperConfig(kind=kind, width=width, n_layers=n_layers, **given)
        except TypeError as error:
            known = sorted(set(MapperConfig.__dataclass_fields__) - {"kind", "width", "n_layers"})
            raise ValueError(
                f"system.mapper has keys that do not fit ({error}); expected some of "
                f"{', '.join(known)}."
            ) from error
        return Mapper(config, self.model.injection.base_norm(PLACEHOLDERS[kind]))

    def _start_from(self, path: str) -> None:
        """Take a trained mapper in the place of the fresh one of its kind."""
        mapper, facts = load_mapper(path)
        kind, model = mapper.config.kind, self.model
        if kind not in self.controls or kind in self._loaded_kinds:
            raise ValueError(
                f"system.mapper_weights names {path}, a mapper of kind {kind!r}; expected at most "
                f"one of each of {', '.join(self.controls)}."
            )
        check_fits(facts, model.prior.name, model.injection.width, model.table)
        self.mappers[kind] = mapper.train().requires_grad_(True).to(model.device)
        self._loaded_kinds.add(kind)
        threestudio.info("the %s mapper starts from %s (step %d).", kind, path, facts.step)

    def save_mappers(self, folder: str | Path) -> list[Path]:
        """Write each mapper as safetensors and JSON, with all that it needs to be used again."""
        adapter = self.model.ip_adapter
        facts = MapperFacts(
            base_model=self.prior.name,
            base_revision=self.prior.revision,
            layer_table=self.model.table,
            injection=self.model.injection.config,
            prompt_template=self.model.composition.prompt(self.cfg.prompt_template),
            step=self.true_global_step,
            ip_adapter=adapter.weights if adapter else None,
            ip_adapter_scale=adapter.scale if adapter else None,
            image_encoder=adapter.image_encoder if adapter else None,
            image_encoder_folder=adapter.image_encoder_folder if adapter else None,
            sampling=asdict(self.steering.sampling),
        )
        return [
            save_mapper(Path(folder) / f"{kind}-mapper-step-{facts.step}", mapper, facts)[0]
            for kind, mapper in self.mappers.items()
        ]


def checked_keys(cls: type[Settings], given: Mapping[str, Any], key: str) -> Settings:
    """A dataclass from a mapping of a config.

    Raises:
        ValueError: a key that it does not have.
    """
    known = [each.name for each in fields(cls)]
    unknown = [name for name in given or {} if name not in known]
    if unknown:
        raise ValueError(f"{key} has the key {unknown[0]!r}; expected some of {', '.join(known)}.")
    return cls(**(given or {}))
