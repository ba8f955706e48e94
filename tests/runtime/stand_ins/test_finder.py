"""Imports of packages that need CUDA: answered where they are absent, left alone where not."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types

import pytest
from threestudio.kernels import tinycudann as ours
from threestudio.stand_ins import finder
from threestudio.stand_ins.finder import NeedsPackageError, install_stand_ins, is_installed

pytestmark = pytest.mark.skipif(
    any(is_installed(package) for package in finder.STAND_INS), reason="a real one is installed"
)


@pytest.fixture(autouse=True)
def fresh_imports(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    forget()
    install_stand_ins()
    yield
    forget()


def forget():
    for name in [n for n in sys.modules if n.split(".")[0] in finder.STAND_INS]:
        del sys.modules[name]


def test_each_package_is_answered_with_one_line(caplog):
    caplog.set_level("INFO")
    import nerfacc
    import nvdiffrast.torch as dr
    import tinycudann

    assert dr.__name__ == "nvdiffrast.torch"
    assert tinycudann.Encoding is ours.Encoding and nerfacc.__version__.startswith("0.5")
    for package in finder.STAND_INS:
        importlib.import_module(package)
        lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith(package)]
        assert len(lines) == 1 and "is not installed; a stand-in answers its import" in lines[0]
    assert "What works: Encoding, Network, NetworkWithInputEncoding" in caplog.text
    assert "What works: nothing" in caplog.text


def test_submodules_hold_what_the_package_does():
    import nerfacc
    from nerfacc.estimators.occ_grid import OccGridEstimator
    from nerfacc.volrend import accumulate_along_rays

    assert accumulate_along_rays is nerfacc.accumulate_along_rays
    assert OccGridEstimator is nerfacc.OccGridEstimator


def test_what_is_absent_may_be_imported_and_derived_from_but_not_used():
    import nvdiffrast.torch as dr
    from nerfacc import PropNetEstimator, importance_sampling

    class Derived(PropNetEstimator):
        pass

    uses = {
        "nvdiffrast.torch.RasterizeGLContext": lambda: dr.RasterizeGLContext(output_db=False),
        "nvdiffrast.torch.rasterize": lambda: dr.rasterize(None, None),
        "nvdiffrast.torch.DepthPeeler": lambda: dr.DepthPeeler.rasterize_next_layer,
        "nerfacc.PropNetEstimator": Derived,
        "nerfacc.importance_sampling": lambda: importance_sampling(1, 2, n=3),
    }
    for name, use in uses.items():
        with pytest.raises(NeedsPackageError, match=f"^{name} needs a CUDA GPU and the real pack"):
            use()


def test_names_that_no_version_has_are_unknown():
    import tinycudann

    assert not hasattr(tinycudann, "no_such_name")
    with pytest.raises(AttributeError, match="'tinycudann' .a stand-in. has no attribute 'no_su"):
        getattr(tinycudann, "no_such_" + "name")


def test_an_installed_package_wins(tmp_path, monkeypatch):
    (tmp_path / "tinycudann").mkdir()
    (tmp_path / "tinycudann" / "__init__.py").write_text("REAL = True\n")
    (tmp_path / "nerfacc").mkdir()  # a mere folder of that name is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    assert is_installed("tinycudann") and not is_installed("nerfacc")
    import tinycudann

    assert tinycudann.REAL and not hasattr(tinycudann, "Encoding")
    with pytest.raises(ModuleNotFoundError, match="No module named 'tinycudann.modules'"):
        importlib.import_module("tinycudann.modules")


def test_a_stand_in_does_not_count_as_installed():
    import tinycudann

    assert importlib.util.find_spec("tinycudann") and not is_installed("tinycudann")
    assert isinstance(tinycudann, types.ModuleType)
    from threestudio.kernels.hash_grid import _tinycudann_is_installed

    _tinycudann_is_installed.cache_clear()
    assert not _tinycudann_is_installed()


def test_it_is_installed_once_and_asked_after_what_is_on_the_path():
    install_stand_ins()
    places = [i for i, f in enumerate(sys.meta_path) if isinstance(f, finder.StandInFinder)]
    assert len(places) == 1 and places[0] > sys.meta_path.index(importlib.machinery.PathFinder)
    assert importlib.util.find_spec("no_such_package_at_all") is None
