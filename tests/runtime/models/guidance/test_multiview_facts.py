import json

import pytest
import torch
from threestudio.models.guidance import multiview_facts
from threestudio.models.guidance.multiview_facts import (
    MultiviewFacts,
    camera_vector_function,
    read_multiview_facts,
    register_camera_vector,
)


def flat_cameras(c2w, fovy, kind):
    """Registered below under its dotted name."""
    return torch.cat([c2w.flatten(1), fovy[:, None]], dim=1)


def test_a_folder_that_says_nothing_is_mvdream(tmp_path):
    assert read_multiview_facts(tmp_path) == MultiviewFacts(4, "mvdream", 256)


def test_facts_are_read(tmp_path):
    facts = {"num_views": 2, "camera_vector": "embedded", "image_size": 64}
    (tmp_path / "multiview.json").write_text(json.dumps(facts))
    assert read_multiview_facts(tmp_path) == MultiviewFacts(2, "embedded", 64)


@pytest.mark.parametrize("content", ['{"num_view": 4}', '{"num_views": "4"}'])
def test_wrong_facts_are_refused(tmp_path, content):
    (tmp_path / "multiview.json").write_text(content)
    with pytest.raises(ValueError, match=r"expected the keys num_views \(int\), camera_vector"):
        read_multiview_facts(tmp_path)


def test_camera_vectors_are_found_by_kind(monkeypatch):
    monkeypatch.setattr(multiview_facts, "_camera_vectors", {})
    with pytest.raises(ValueError, match="'flat'; expected one of none, since no extension"):
        camera_vector_function("flat")
    register_camera_vector("flat", f"{__name__}:flat_cameras")
    vector = camera_vector_function("flat")(torch.eye(4)[None], torch.tensor([0.5]))
    assert vector.shape == (1, 17) and vector[0, -1] == 0.5
    with pytest.raises(ValueError, match="'round'; expected one of flat"):
        camera_vector_function("round")
