"""The names that extensions import, and the registry: sections 1.1, 1.2 and the must-have set."""

import importlib
import logging

import pytest
import threestudio
from packaging.version import Version

# Module to the names that the surveyed extensions take from it.
NAMES = {
    "threestudio": "register find __modules__ __version__ info debug warn logger",
    "threestudio.utils.base": (
        "Updateable BaseObject BaseModule Configurable update_if_possible update_end_if_possible"
    ),
    "threestudio.utils.config": (
        "ExperimentConfig load_config parse_structured config_to_primitive dump_config C_max"
    ),
    "threestudio.utils.misc": (
        "C parse_version get_rank get_device load_module_weights cleanup finish_with_cleanup "
        "barrier broadcast enable_gradient find_last_path"
    ),
    "threestudio.utils.ops": (
        "dot reflect scale_tensor get_activation trunc_exp SpecifyGradient chunk_batch "
        "get_ray_directions get_rays get_projection_matrix get_mvp_matrix "
        "get_full_projection_matrix convert_pose get_projection_matrix_gaussian get_fov_gaussian "
        "get_cam_info_gaussian binary_cross_entropy perpendicular_component "
        "shifted_expotional_decay shifted_cosine_decay validate_empty_rays mask_ray_directions "
        "tet_sdf_diff"
    ),
    "threestudio.utils.typing": (
        "Any Callable Dict Iterable List Literal NamedTuple NewType Optional Sized Tuple Type "
        "TypeVar Union Bool Complex Float Inexact Int Integer Num Shaped UInt DictConfig Tensor "
        "typechecker"
    ),
    "threestudio.utils.saving": "SaverMixin",
    "threestudio.utils.loss": "tv_loss",
    "threestudio.utils.rasterize": "NVDiffRasterizerContext",
    "threestudio.utils.callbacks": (
        "VersionedCallback CodeSnapshotCallback ConfigSnapshotCallback CustomProgressBar "
        "ProgressCallback"
    ),
    "threestudio.systems.base": "BaseSystem BaseLift3DSystem",
    "threestudio.systems.utils": (
        "parse_optimizer parse_scheduler parse_scheduler_to_instance get_parameters "
        "getattr_recursive"
    ),
    "threestudio.systems.optimizers": "Adan",
    "threestudio.data.uncond": (
        "RandomCameraDataModuleConfig RandomCameraDataset RandomCameraIterableDataset "
        "RandomCameraDataModule"
    ),
    "threestudio.models.mesh": "Mesh",
    "threestudio.models.networks": (
        "get_encoding get_mlp create_network_with_input_encoding CompositeEncoding "
        "ProgressiveBandFrequency ProgressiveBandHashGrid HashGridSpatialTime TCNNEncoding "
        "VanillaMLP SphereInitVanillaMLP NetworkWithInputEncoding"
    ),
    "threestudio.models.geometry.base": (
        "BaseGeometry BaseImplicitGeometry BaseExplicitGeometry contract_to_unisphere"
    ),
    "threestudio.models.materials.base": "BaseMaterial",
    "threestudio.models.background.base": "BaseBackground",
    "threestudio.models.renderers.base": "Renderer VolumeRenderer Rasterizer",
    "threestudio.models.exporters.base": "Exporter ExporterOutput",
    "threestudio.models.prompt_processors.base": (
        "PromptProcessor PromptProcessorOutput DirectionConfig hash_prompt shift_azimuth_deg"
    ),
}
BUILT_IN = (
    "random-camera-datamodule implicit-volume no-material diffuse-with-point-light-material "
    "solid-color-background neural-environment-map-background nerf-volume-renderer "
    "stable-diffusion-prompt-processor stable-diffusion-guidance "
    "stable-diffusion-vsd-guidance mesh-exporter dummy-exporter dummy-prompt-processor "
    "dreamfusion-system prolificdreamer-system"
).split()


@pytest.fixture
def registered():
    """Register classes for one test: ``registered(name, cls)``."""
    taken = []

    def register(name, cls):
        threestudio.register(name)(cls)
        taken.append(name)
        return cls

    yield register
    for name in taken:
        del threestudio.__modules__[name]


@pytest.mark.parametrize("module", NAMES)
def test_names_are_importable_from_where_extensions_import_them(module):
    loaded = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(loaded, name)]
    assert missing == []


def test_star_import_of_typing_brings_everything():
    scope = {}
    exec("from threestudio.utils.typing import *", scope)  # what all nineteen extensions do
    assert set(NAMES["threestudio.utils.typing"].split()) <= set(scope)


def test_version_satisfies_the_check_of_extensions():
    assert Version(threestudio.__version__) >= Version("0.2.3")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_modules_are_known_without_an_import_of_theirs(name):
    assert isinstance(threestudio.find(name), type)


@pytest.mark.parametrize("name", ["nvdiff-rasterizer", "zero123-guidance", "pbr-material"])
def test_what_upstream_has_and_this_runtime_may_not_is_no_bare_key_error(name):
    try:
        assert isinstance(threestudio.find(name), type)
    except KeyError as error:
        assert name in str(error) and "use " in str(error)


def test_parts_are_reached_as_attributes_of_the_root():
    base = threestudio.models.geometry.base
    assert issubclass(threestudio.find("implicit-volume"), base.BaseImplicitGeometry)


def test_a_registered_class_is_found_and_returned_unchanged(registered):
    cls = registered("contract-a", type("A", (), {}))
    assert threestudio.find("contract-a") is cls
    assert threestudio.__modules__["contract-a"] is cls


def test_a_name_can_be_registered_once(registered):
    registered("contract-a", type("A", (), {}))
    with pytest.raises(ValueError, match="contract-a"):
        threestudio.register("contract-a")(type("B", (), {}))


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError, match="contract-nothing"):
        threestudio.find("contract-nothing")


def test_a_composite_name_is_a_new_class_with_the_mixins_first(registered):
    main = registered("contract-main", type("Main", (), {"who": lambda self: "main"}))
    first = registered("contract-a", type("A", (), {"who": lambda self: "a"}))
    second = registered("contract-b", type("B", (), {"who": lambda self: "b"}))
    made = threestudio.find("contract-main:contract-a,contract-b")
    assert made.__bases__ == (first, second, main)
    assert made.__name__ == "contract-main.contract-a,contract-b"
    assert made().who() == "a"
    assert threestudio.find("contract-main:contract-b").__bases__ == (second, main)
    with pytest.raises(ValueError):
        threestudio.find("contract-main:contract-a:contract-b")


def test_log_helpers_write_to_lightnings_logger(caplog):
    assert threestudio.logger is logging.getLogger("pytorch_lightning")
    with caplog.at_level(logging.DEBUG, logger="pytorch_lightning"):
        threestudio.debug("at debug")
        threestudio.info("at info")
        threestudio.warn("at warning")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("DEBUG", "at debug"), ("INFO", "at info"), ("WARNING", "at warning")
    ]  # fmt: skip
