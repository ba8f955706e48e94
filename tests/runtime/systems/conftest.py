import pytest
import threestudio

from tests.fixtures.small_system import EVENTS, Exporter, Part


@pytest.fixture
def small_parts(monkeypatch):
    """Let the registry know the parts of `small_system` alone, and begin to write down anew."""
    EVENTS.clear()
    monkeypatch.setattr(threestudio, "find", {"part": Part, "mesh-exporter": Exporter}.__getitem__)
