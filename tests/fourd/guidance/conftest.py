import pytest
import torch

from tests.fixtures.model_folders import write_multiview_folder


@pytest.fixture(scope="session")
def epsilon_folder(tmp_path_factory):
    """A tiny MVDream: epsilon prediction, 16 camera numbers, 4 views of 16 x 16 pixels."""
    return write_multiview_folder(tmp_path_factory.mktemp("priors") / "mvdream")


@pytest.fixture(scope="session")
def embedded_folder(tmp_path_factory):
    """Like the embedded prior: v prediction, zero terminal SNR, 32 camera numbers."""
    return write_multiview_folder(
        tmp_path_factory.mktemp("priors") / "embedded",
        camera_vector="embedded",
        prediction_type="v_prediction",
        zero_terminal_snr=True,
    )


@pytest.fixture
def batch():
    """Two objects, seen from four sides each; the keys of a data module's batch."""
    g = torch.Generator().manual_seed(3)
    c2w = torch.eye(4).repeat(8, 1, 1)
    c2w[:, :3, 3] = torch.randn(8, 3, generator=g)
    return {
        "rgb": torch.rand(8, 12, 12, 3, generator=g),
        "elevation": torch.full((8,), 15.0),
        "azimuth": torch.arange(8) * 90.0,
        "camera_distances": torch.full((8,), 2.5),
        "c2w": c2w,
        "fovy": torch.full((8,), 0.7),
        "height": 12,
        "light_positions": torch.zeros(8, 3),
    }
