"""Folder names from any text."""

import os

import pytest
from threestudio.utils.slug import safe_folder_name, safe_relative_path


def test_ordinary_text_is_kept():
    assert safe_folder_name("a_red_cube,_4k: really!", "@20260101-000000") == (
        "a_red_cube,_4k: really!@20260101-000000"
    )


@pytest.mark.parametrize(
    "text",
    ["../../etc", "a/b", "a\\b", "nul\0byte", "..", ".", "", "new\nline", "x" * 300, "é" * 300],
)
def test_the_name_stays_one_folder_below_its_parent(text, tmp_path):
    name = safe_folder_name(text, "@20260101-000000-2")
    folder = tmp_path / name
    folder.mkdir()  # the file system takes it
    assert os.path.realpath(folder.parent) == os.path.realpath(tmp_path)
    assert safe_folder_name(text) not in ("", ".", "..")


def test_long_texts_stay_different():
    first, second = safe_folder_name("a" * 300 + "1"), safe_folder_name("a" * 300 + "2")
    assert first != second
    assert len(first.encode()) <= 200


def test_relative_path_keeps_folders_and_drops_the_way_up():
    assert safe_relative_path("group/run") == "group/run"
    assert safe_relative_path("/abs//run/") == "abs/run"
    assert safe_relative_path("../up") == ".._/up"
    assert safe_relative_path("") == "_"
