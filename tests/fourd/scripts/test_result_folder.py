"""Folders of results belong to one run, and what is in them stays."""

import cv2
import numpy as np
import pytest
import torch

from custom.fourd.scripts.result_folder import (
    claim_output,
    encode_png,
    side_by_side,
    write_missing,
    write_new,
)


def read(path):
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def test_a_folder_is_claimed_once_and_only_by_its_own_run(tmp_path):
    folder = tmp_path / "a" / "b"
    claim_output(folder, {"seed": 0}, "run.json", "walk")
    claim_output(folder, {"seed": 0}, "run.json", "walk")
    with pytest.raises(ValueError, match=r"results of another walk \(seed was 0 and is 1\); they"):
        claim_output(folder, {"seed": 1}, "run.json", "walk")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "left.part").touch()
    claim_output(tmp_path / "c", {}, "run.json", "walk")
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="no folder of this tool's results; nothing is overwrit"):
        claim_output(tmp_path, {}, "run.json", "walk")
    assert not (tmp_path / "run.json").exists()


def test_files_are_new_or_not_written(tmp_path):
    write_new(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"1"]


def test_pictures_are_rounded_and_kept(tmp_path):
    image = torch.tensor([[[0.5, 0.0, 1.2], [0.1, 0.999, -0.3]]])
    mask = torch.tensor([[True, False]])
    assert write_missing(tmp_path, {"image": image, "mask": mask}) == 2
    assert read(tmp_path / "image.png").tolist() == [[[128, 0, 255], [26, 255, 0]]]
    assert read(tmp_path / "mask.png")[..., 0].tolist() == [[255, 0]]
    (tmp_path / "mask.png").write_bytes(b"mine")
    assert write_missing(tmp_path, {"image": image, "mask": mask}) == 0
    assert (tmp_path / "mask.png").read_bytes() == b"mine"
    data = np.frombuffer(encode_png(image), np.uint8)
    assert (cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1] == read(tmp_path / "image.png")).all()


def test_pictures_stand_side_by_side_with_a_white_gap():
    joined = side_by_side([torch.zeros(2, 3, 3), torch.tensor([[True], [False]])])
    assert joined[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert joined[1, :, 2].tolist() == [0, 0, 0, 1, 1, 0]
