"""The stand-alone editor of image folders, on a tiny random model."""

import json

import cv2
import numpy as np
import pytest
import torch

from custom.fourd.scripts.edit_images import encode_png, find_frames, main, write_new
from tests.fixtures.edit_folders import write_edit_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_edit_folder(tmp_path_factory.mktemp("edit")))


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Three images in a folder; the cache of text embeddings goes to the test's own folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        write_image(folder / f"{number}.png", seed=number)
    return folder


def write_image(path, height=10, width=12, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())


def run(images, output, model, *flags, instruction="make it red"):
    args = [str(images), "--output", str(output), "--model", model, "--instruction", instruction]
    return main([*args, "--start", "500", "--steps", "1", *flags])


def results(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_every_image_is_edited_and_windows_do_not_matter(images, model, tmp_path, capsys):
    assert run(images, tmp_path / "a", model, "--window", "2", "--anchor", "1") == 0
    assert "edited 2 of 3 images\nedited 3 of 3 images" in capsys.readouterr().out
    found = results(tmp_path / "a")
    assert list(found) == ["0.png", "1.png", "2.png"]
    record = json.loads((tmp_path / "a" / "edit.json").read_text())
    assert record["instruction"] == "make it red" and list(record["images"]) == list(found)
    for name, data in found.items():
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert image.shape == (10, 12, 3)
        assert (image != cv2.imread(str(images / name))).mean() > 0.5
    # What was lost is made again, alike up to a rounding; what is there is kept.
    (tmp_path / "a" / "2.png").unlink()
    (tmp_path / "a" / "0.png").write_bytes(b"mine")
    assert run(images, tmp_path / "a", model, "--window", "8", "--anchor", "1") == 0
    again = results(tmp_path / "a")
    assert again["0.png"] == b"mine" and again["1.png"] == found["1.png"]
    first, second = (
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).astype(int)
        for data in (found["2.png"], again["2.png"])
    )
    assert abs(first - second).max() <= 1


def test_another_edit_needs_another_folder(images, model, tmp_path, capsys):
    output = tmp_path / "a"
    output.mkdir()
    (output / "note.txt").write_text("mine")
    assert run(images, output, model) == 1
    assert "holds note.txt and is no folder of this tool's results" in capsys.readouterr().err
    (output / "note.txt").unlink()
    assert run(images, output, model) == 0
    before = results(output)
    assert run(images, output, model, "--seed", "1") == 1
    assert "results of another edit (seed was 0 and is 1)" in capsys.readouterr().err
    assert results(output) == before


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda f: write_image(f / "9.png", 8, 12), "9.png has 8 x 12 pixels and 0.png 10 x 12"),
        (lambda f: (f / "9.png").write_bytes(b"no image"), "9.png is damaged or no image"),
        (lambda f: (f / "9.jpg").write_bytes(b""), "9.jpg is damaged or no image"),
        (lambda f: write_image(f / "0.bmp"), "would both become 0.png; expected different"),
        (lambda f: [p.unlink() for p in f.iterdir()], "holds no images; expected files ending"),
    ],
)
def test_broken_folders_are_refused_before_work(images, prepare, message):
    prepare(images)
    with pytest.raises(ValueError, match=message):
        find_frames(images)


def test_wrong_words_are_one_sentence(images, model, tmp_path, capsys):
    for flags, message in (
        (("--anchor", "7"), "--anchor 7 is no image of the folder; expected one of 0.png"),
        (("--window", "0"), "--window is 0; expected 1 or more images"),
    ):
        assert run(images, tmp_path / "a", model, *flags) == 1
        assert message in capsys.readouterr().err
    assert run(images, tmp_path / "a", model, instruction=" ") == 1
    assert "instruction is empty" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_file_is_written_once(tmp_path):
    write_new(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"2")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"1")]


def test_colours_are_rounded_not_cut():
    image = torch.tensor([[[0.999, 0.5, 0.001]]])
    pixels = cv2.imdecode(np.frombuffer(encode_png(image), np.uint8), cv2.IMREAD_COLOR)
    assert pixels[0, 0].tolist() == [0, 128, 255]
