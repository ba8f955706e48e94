import numpy as np
import pytest
import torch
from threestudio.utils.image_grid import (
    assemble_grid,
    grayscale_picture,
    rgb_picture,
    to_numpy,
    uv_picture,
)


def test_values_are_converted_wherever_they_are():
    data = to_numpy({"a": torch.ones(2, requires_grad=True), "b": [torch.zeros(1), 3], "c": None,
                     "d": torch.ones(1, dtype=torch.bfloat16)})
    assert data["a"].tolist() == [1, 1] and data["b"][1] == 3 and data["c"] is None
    assert data["d"].dtype == np.float32
    with pytest.raises(TypeError, match=r"cannot convert a set; expected a tensor"):
        to_numpy({1})


def test_colours_by_hand():
    img = torch.tensor([[[0.0, 0.5, 1.0], [-1.0, 2.0, float("nan")]]])
    assert rgb_picture(img).tolist() == [[[0, 127, 255], [0, 255, 0]]]
    assert rgb_picture(img, data_range=(-1, 1))[0, 0].tolist() == [127, 191, 255]
    chw = rgb_picture(img.permute(2, 0, 1), data_format="CHW")
    assert np.array_equal(chw, rgb_picture(img))


@pytest.mark.parametrize("channels, shape", [(1, (2, 5, 3)), (2, (2, 5, 3)), (3, (2, 5, 3)),
                                             (4, (2, 5, 4)), (5, (2, 10, 3)), (7, (2, 15, 3))])
def test_channels_become_tiles(channels, shape):
    img = torch.rand(2, 5, channels)
    picture = rgb_picture(img)
    assert picture.shape == shape
    if channels == 7:
        assert np.array_equal(picture[:, 5:10, 1], rgb_picture(img[..., 4:5])[..., 0])
        assert not picture[:, 10:, 1:].any()


def test_bad_pictures():
    with pytest.raises(ValueError, match=r"shape \(2, 2\); expected HWC"):
        rgb_picture(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"data_format is 'WHC'"):
        rgb_picture(torch.zeros(2, 2, 3), "WHC")
    with pytest.raises(ValueError, match=r"grayscale image has shape \(2, 2, 2\)"):
        grayscale_picture(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match=r"cmap is 'heat'; expected jet"):
        grayscale_picture(torch.zeros(2, 2), cmap="heat")
    with pytest.raises(ValueError, match=r"cmap is 'x'; expected 'checkerboard'"):
        uv_picture(torch.zeros(2, 2, 2), cmap="x")


def test_gray_spans_its_range_and_survives_constants():
    img = torch.tensor([[1.0, 2.0], [3.0, float("inf")]])
    assert grayscale_picture(img, cmap=None)[..., 0].tolist() == [[0, 127], [255, 255]]
    assert grayscale_picture(torch.ones(2, 2, 1), cmap=None).max() == 0
    assert grayscale_picture(img, (0, 4), None)[0, 0, 0] == 63
    assert grayscale_picture(torch.full((1, 1), float("nan")), cmap=None).tolist() == [[[0, 0, 0]]]


def test_colour_maps_are_rgb():
    ends = torch.tensor([[0.0, 1.0]])
    low, high = grayscale_picture(ends, cmap="jet")[0]
    assert low[2] > 100 and low[0] == 0 and high[0] > 100 and high[2] == 0
    assert grayscale_picture(ends, cmap="spectral")[0].tolist() == [[158, 1, 66], [94, 79, 162]]
    low, high = grayscale_picture(ends, cmap="magma")[0].astype(int)
    assert low.sum() < 20 and high.sum() > 600


def test_uv_maps():
    uv = torch.tensor([[[0.0, 0.0], [1 / 64, 0.0], [1 / 64, 1 / 64]]])
    assert uv_picture(uv)[0, :, 0].tolist() == [255, 128, 255]
    assert uv_picture(torch.tensor([[[1.0, 0.5]]]), cmap="color").tolist() == [[[255, 127, 0]]]


def item(value, size=(4, 6), kind="rgb"):
    img = torch.full((*size, 3), value) if kind == "rgb" else torch.full(size, value)
    return {"type": kind, "img": img, "kwargs": {} if kind == "rgb" else {"data_range": (0, 1)}}


def test_grid_of_one_row_and_of_ragged_rows():
    assert assemble_grid([item(0.0), item(1.0)])[0, :, 0].tolist() == [0] * 6 + [255] * 6
    grid = assemble_grid([[item(1.0), item(1.0)], [item(1.0)]])
    assert grid.shape == (8, 12, 3) and not grid[4:, 6:].any() and grid[4:, :6].all()


@pytest.mark.parametrize("align, shape", [("max", (8, 16, 3)), ("min", (4, 12, 3)),
                                          (5, (5, 10, 3)), ((3, 7), (3, 14, 3)),
                                          ([3, 7], (3, 14, 3))])
def test_tiles_are_aligned(align, shape):
    assert assemble_grid([item(1.0), item(1.0, (8, 8))], align).shape == shape


def test_grid_mixes_kinds_and_writes_text():
    row = [item(1.0, (40, 90)), item(0.5, (40, 90), "grayscale")]
    plain = assemble_grid([row, row])
    text = assemble_grid([row, row], texts=["view 1", "view 2"])
    assert text.shape == plain.shape == (80, 180, 3)
    assert not np.array_equal(text[:40, :90], plain[:40, :90])
    assert np.array_equal(text[:, 90:], plain[:, 90:])


def test_bad_grids():
    for empty in ([], [[]]):
        with pytest.raises(ValueError, match="the image grid is empty"):
            assemble_grid(empty)
    with pytest.raises(ValueError, match=r"image type is 'depth'; expected one of rgb, uv, gray"):
        assemble_grid([{"type": "depth", "img": None}])
    with pytest.raises(ValueError, match=r"align is 'middle'"):
        assemble_grid([item(1.0)], "middle")
