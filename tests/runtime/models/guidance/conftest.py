import pytest

from tests.fixtures.model_folders import write_multiview_folder, write_stable_diffusion_folder


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A tiny Stable Diffusion: epsilon prediction."""
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("priors") / "sd")


@pytest.fixture(scope="session")
def v_folder(tmp_path_factory):
    """A tiny v-prediction model whose last step holds no signal."""
    return write_stable_diffusion_folder(
        tmp_path_factory.mktemp("priors") / "v",
        prediction_type="v_prediction",
        zero_terminal_snr=True,
    )


@pytest.fixture(scope="session")
def multiview_folder(tmp_path_factory):
    """A tiny multi-view model with the embedded camera vector."""
    return write_multiview_folder(
        tmp_path_factory.mktemp("priors") / "mv", camera_vector="embedded"
    )
