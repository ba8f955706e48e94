"""The names of nvdiffrast: none works here, all can be imported."""

from threestudio.stand_ins import nvdiffrast


def test_it_offers_nothing_and_names_what_there_would_be():
    assert nvdiffrast.__all__ == []
    used_by_extensions = {
        "RasterizeCudaContext", "RasterizeGLContext", "rasterize", "interpolate", "antialias",
        "texture",
    }  # fmt: skip
    assert used_by_extensions <= set(nvdiffrast.ABSENT)
