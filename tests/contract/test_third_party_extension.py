"""An extension written against upstream, loaded as upstream loads it, and its YAML.

Nothing here looks inside the runtime: only names of the contract are used, so the file stays
meaningful with the original package in this one's place (its loader then takes the place of ours).
"""

import sys
import textwrap

import pytest
import threestudio
import torch
from threestudio.utils.config import load_config
from threestudio.utils.misc import C

NAME = "threestudio-contract-example"

FILES = {
    "__init__.py": """
        import threestudio
        from packaging.version import Version

        if hasattr(threestudio, "__version__") and Version(threestudio.__version__) >= Version(
            "0.2.0"
        ):
            pass
        else:
            raise ValueError("threestudio version must be >= 0.2.0")

        from .guidance import example_guidance
        from .guidance.mixins import louder
        from .system import example
    """,
    "guidance/__init__.py": "",
    "guidance/example_guidance.py": """
        from dataclasses import dataclass, field

        import torch

        import threestudio
        from threestudio.utils.base import BaseObject
        from threestudio.utils.misc import C, cleanup, parse_version
        from threestudio.utils.typing import *


        @threestudio.register("contract-example-guidance")
        class ExampleGuidance(BaseObject):
            @dataclass
            class Config(BaseObject.Config):
                guidance_scale: float = 100.0
                grad_clip: Optional[Any] = None
                min_step_percent: float = 0.02
                shape: Tuple[float, float] = (1.0, 2.0)
                extra: dict = field(default_factory=dict)

            cfg: Config

            def configure(self) -> None:
                threestudio.info("Loading the example ...")
                self.min_step = C(self.cfg.min_step_percent, 0, 0)

            def __call__(self, x: Float[Tensor, "B C"], **kwargs) -> Dict[str, Any]:
                return {"loss_sds": (x * self.volume()).sum(), "volume": self.volume()}

            def volume(self) -> float:
                return 1.0

            def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False):
                self.min_step = C(self.cfg.min_step_percent, epoch, global_step)
    """,
    "guidance/mixins.py": """
        import threestudio


        @threestudio.register("contract-louder")
        class Louder:
            def volume(self):
                return 10.0 * super().volume()


        louder = Louder
    """,
    "system/__init__.py": "",
    "system/example.py": """
        from dataclasses import dataclass

        import threestudio
        from threestudio.utils.base import BaseModule, Updateable
        from threestudio.utils.typing import *

        from ..guidance.example_guidance import ExampleGuidance


        @threestudio.register("contract-example-module")
        class ExampleModule(BaseModule):
            @dataclass
            class Config(BaseModule.Config):
                guidance_type: str = ""
                guidance: Optional[dict] = None

            def configure(self, size: int = 2) -> None:
                import torch

                self.layer = torch.nn.Linear(size, 1)
                self.guidance = ExampleGuidance({"min_step_percent": [0, 1.0, 0.0, 10]})
    """,
}
UPSTREAM_YAML = """
name: "contract-example"
tag: "${rmspace:${system.prompt_processor.prompt},_}"
exp_root_dir: "outputs"
seed: 0

data_type: "random-camera-datamodule"
data:
  batch_size: [8, 4]
  width: 64
  eval_fovy_deg: 70.

system_type: "dreamfusion-system"
system:
  geometry_type: "implicit-volume"
  geometry:
    radius: 2.0
    normal_type: "analytic"
  renderer:
    radius: ${system.geometry.radius}
    gt: ${gt0:${trainer.max_steps}}
  prompt_processor_type: "stable-diffusion-prompt-processor"
  prompt_processor:
    pretrained_model_name_or_path: "runwayml/stable-diffusion-v1-5"
    prompt: ???
  guidance_type: "contract-example-guidance:contract-louder"
  guidance:
    guidance_scale: 7.5
    min_step_percent: [0, 0.98, 0.02, 8000]
  loss:
    lambda_sds: 1.
    lambda_orient: [0, 10., 1000., 5000]
    lambda_any: ${cmaxgt0:${system.loss.lambda_orient}}
  optimizer:
    name: Adam
    args:
      lr: 0.01
      betas: [0.9, 0.99]
      eps: 1.e-15

trainer:
  max_steps: 10000
  log_every_n_steps: 1
  val_check_interval: 200
  precision: 16-mixed

checkpoint:
  save_last: true
  save_top_k: -1
  every_n_train_steps: ${trainer.max_steps}
"""


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    from threestudio.launcher.extensions import load_extensions

    custom = tmp_path_factory.mktemp("custom")
    for name, text in FILES.items():
        path = custom / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    assert load_extensions(custom) == [NAME]
    yield sys.modules[NAME]
    for name in [n for n in threestudio.__modules__ if n.startswith("contract-")]:
        del threestudio.__modules__[name]
    for name in [n for n in sys.modules if n == NAME or n.startswith(NAME + ".")]:
        del sys.modules[name]


def test_extension_with_a_hyphen_is_importable_under_its_folder_name(extension):
    guidance = threestudio.find("contract-example-guidance")
    assert guidance.__module__ == f"{NAME}.guidance.example_guidance"
    assert extension.example_guidance.ExampleGuidance is guidance


def test_composite_name_puts_the_mixin_before_the_main_class(extension):
    louder = threestudio.find("contract-example-guidance:contract-louder")({"guidance_scale": 7.5})
    assert louder(torch.ones(2, 3))["loss_sds"] == pytest.approx(60.0)
    assert louder.cfg.guidance_scale == 7.5


def test_module_updates_the_parts_that_it_holds(extension):
    module = threestudio.find("contract-example-module")(None, size=3)
    assert module.layer.in_features == 3
    module.do_update_step(0, 5)
    assert module.guidance.min_step == pytest.approx(0.5)


def test_upstream_yaml_parses_with_its_idioms(extension, tmp_path):
    cfg = load_config(
        UPSTREAM_YAML,
        from_string=True,
        cli_args=[
            "system.prompt_processor.prompt=a hamburger",
            f"exp_root_dir={tmp_path}",
            "trainer.max_steps=50",
        ],
        n_gpus=1,
    )
    assert cfg.trial_name.startswith("a_hamburger@")
    assert cfg.exp_dir == f"{tmp_path}/contract-example"
    assert cfg.system.renderer.radius == 2.0 and cfg.system.renderer.gt is True
    assert cfg.system.loss.lambda_any is True
    assert cfg.checkpoint.every_n_train_steps == 50
    assert cfg.trainer.precision == "16-mixed"
    assert C(cfg.system.loss.lambda_orient, 0, 2500) == pytest.approx(505.0)
    guidance = threestudio.find(cfg.system.guidance_type)(cfg.system.guidance)
    assert list(guidance.cfg.min_step_percent) == [0, 0.98, 0.02, 8000]
    assert guidance.min_step == pytest.approx(0.98)


def test_configs_are_shared_with_code_that_writes_into_them(extension):
    cfg = load_config(
        UPSTREAM_YAML,
        from_string=True,
        cli_args=["system.prompt_processor.prompt=a hamburger"],
        make_trial_dir=False,
    )
    guidance = threestudio.find("contract-example-guidance")({"extra": {"a": 1}})
    guidance.cfg.extra["prompt"] = cfg.system.prompt_processor.pretrained_model_name_or_path
    assert guidance.cfg.extra["prompt"] == "runwayml/stable-diffusion-v1-5"
