"""Every registered name of upstream is found, or refused by a sentence that says what to use."""

import re

import pytest
import threestudio
from threestudio import registry
from threestudio.registry_refusals import REFUSED

# Every name that upstream registers, by family; written from its interface, not from our tables.
UPSTREAM = """
dreamfusion-system efficient-dreamfusion-system magic3d-system sjc-system latentnerf-system
fantasia3d-system textmesh-system prolificdreamer-system zero123-system zero123-simple-system
magic123-system image-condition-dreamfusion-system instructnerf2nerf-system
control4d-multiview-system sdi-system
random-camera-datamodule eff-random-camera-datamodule single-image-datamodule
multiview-camera-datamodule co3d-datamodule
implicit-volume implicit-sdf volume-grid tetrahedra-sdf-grid custom-mesh
no-material diffuse-with-point-light-material neural-radiance-material pbr-material
hybrid-rgb-latent-material sd-latent-adapter-material
solid-color-background neural-environment-map-background textured-background
nerf-volume-renderer neus-volume-renderer nvdiff-rasterizer patch-renderer gan-volume-renderer
stable-diffusion-guidance stable-diffusion-vsd-guidance stable-diffusion-unified-guidance
stable-diffusion-sdi-guidance deep-floyd-guidance stable-diffusion-instructpix2pix-guidance
stable-diffusion-controlnet-guidance zero123-guidance stable-zero123-guidance
zero123-unified-guidance
stable-diffusion-prompt-processor deep-floyd-prompt-processor dummy-prompt-processor
mesh-exporter dummy-exporter perceptual-loss
""".split()
KINDS = (
    "system datamodule material background renderer rasterizer guidance processor exporter volume "
    "sdf grid"
).split()


def refusal(name):
    with pytest.raises(registry.NotProvidedError) as caught:
        threestudio.find(name)
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_failed_extensions(monkeypatch):
    """Of other tests in this process; a refusal names them."""
    monkeypatch.setattr(registry, "_failed_extensions", {})


@pytest.fixture
def own_tables(monkeypatch):
    for table in ("__modules__", "_lazy_modules", "_aliases", "_failed_extensions", "_refused"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))


def test_the_list_is_upstreams():
    assert len(UPSTREAM) == len(set(UPSTREAM)) == 55


@pytest.mark.parametrize("name", UPSTREAM)
def test_every_upstream_name_is_found_or_refused_by_a_sentence(name):
    if name in registry.known_names():
        assert isinstance(threestudio.find(name), type) and name not in REFUSED
        return
    message = refusal(name)
    start = f"'{name}' is an upstream module that this runtime does not provide: "
    assert message.startswith(start)
    why, instead = message.removeprefix(start).split("; ")
    assert len(why) > 30 and message.endswith(".")
    assert re.search(r"[.!?] ", message) is None, "one sentence"
    assert "use " in instead


def test_only_upstream_names_are_refused():
    assert set(registry.refused_names()) == set(REFUSED) <= set(UPSTREAM)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_a_refusal_recommends_exists(name):
    import custom.fourd  # noqa: F401 - registers fourdfy-system

    instead = REFUSED[name].split("; ")[1]
    words = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)+", instead)
    modules = [word for word in words if word.split("-")[-1] in KINDS]
    for module in modules:
        assert module in registry.known_names()
    assert modules or "threestudio.utils.loss" in instead


@pytest.mark.parametrize("name", ["zero123-guidance:dreamfusion-system",
                                  "dreamfusion-system:pbr-material"])  # fmt: skip
def test_composites_of_a_refused_name_are_refused(name):
    refused = next(part for part in name.split(":") if part in REFUSED)
    assert refusal(name) == refusal(refused)


def test_a_refusal_is_a_key_error_that_is_not_quoted():
    with pytest.raises(KeyError, match="^'pbr-material' is an upstream module that this runtime"):
        threestudio.find("pbr-material")
    assert issubclass(registry.NotProvidedError, registry.UnknownNameError)


def test_an_extension_may_bring_a_refused_name(own_tables):
    brought = type("Zero123", (), {"__module__": "threestudio_zero123"})
    assert threestudio.register("zero123-guidance")(brought) is brought
    assert threestudio.find("zero123-guidance") is brought
    assert "zero123-guidance" not in registry.refused_names()
    assert "stable-zero123-guidance" in registry.refused_names()


def test_a_refusal_names_the_extension_that_failed(own_tables):
    registry.record_failed_extension("threestudio-zero123", ImportError("No module named 'ldm'"))
    assert "'threestudio-zero123' could not be imported: ImportError" in refusal("zero123-guidance")


def test_a_config_that_names_one_is_refused_before_anything_is_built():
    from omegaconf import OmegaConf
    from threestudio.launcher.validate import check_experiment
    from threestudio.utils.config_errors import UnknownKeyError

    cfg = OmegaConf.create({"name": "x", "tag": "y", "system_type": "zero123-system",
                            "data_type": "single-image-datamodule"})  # fmt: skip
    with pytest.raises(UnknownKeyError, match=r"(?s)data_type: 'single-image.*'zero123-system' is"):
        check_experiment(cfg)
