"""Training cells of the image model: what they show, and that twins differ in material alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from custom.fourd.data.fourd_pair_datamodule import FourdPairDataModuleConfig
from custom.fourd.data.pair_cells import orbit_cameras
from custom.fourd.data.world_cells import WorldCells
from custom.fourd.scripts.world_pairs import (
    DISTANCE,
    ELEVATION_DEG,
    TWIN_EVERY,
    in_other_material,
    load_pair_groups,
    render_pair_groups,
    save_pair_groups,
    twin_of,
)
from custom.fourd.scripts.world_views import FOVY_RAD, colour_views
from custom.fourd.world.grammar import parse_caption


@pytest.fixture(scope="module")
def groups():
    return render_pair_groups(TWIN_EVERY + 1, 1, torch.Generator().manual_seed(3), size_px=16)


def test_cells_are_those_that_mappers_are_taught_by(groups):
    """Layers, coloured, against the pair source's own cells, by its default cameras."""
    cfg = FourdPairDataModuleConfig()
    for index, scene in enumerate(groups.scenes[:2]):
        cameras = orbit_cameras(
            [cfg.elevations_deg],
            groups.azimuths_deg[index].tolist(),
            cfg.camera_distance,
            cfg.fovy_deg,
        )
        cells = WorldCells(scene.caption, "s", groups.frame_times[index], cameras, 16, 16)
        for time_id, camera_id in ((0, 3), (2, 1)):
            layers = groups.layers[index, time_id, camera_id].unsqueeze(0)
            ours = colour_views(layers, [scene], torch.zeros(1, 3))[0] * 0.5 + 0.5
            truth = cells.read_cell(time_id, camera_id)[..., :3].movedim(-1, 0) / 255
            # Coverage, shading and the cell are each rounded by half of 1/255 at most.
            torch.testing.assert_close(ours, truth, atol=3 * 0.5 / 255, rtol=0)


def test_times_and_azimuths_are_spread(groups):
    for values, whole in ((groups.frame_times, 1.0), (groups.azimuths_deg, 360.0)):
        quarters = (values / whole * 4).long()
        assert torch.equal(quarters, torch.arange(4).expand(len(values), 4))


def test_twins_are_mutual_and_differ_in_one_material():
    count = 2 * TWIN_EVERY + 4
    pairs = {k: twin_of(k, count) for k in range(count)}
    assert {k: v for k, v in pairs.items() if v is not None} == {3: 4, 4: 3, 8: 9, 9: 8}
    g = torch.Generator().manual_seed(0)
    scene = parse_caption("a red cube spinning next to a wooden blue ball")
    seen = set()
    for _ in range(30):
        other = in_other_material(scene, g)
        changed = [a != b for a, b in zip(scene.objects, other.objects, strict=True)]
        assert sum(changed) == 1
        item = changed.index(True)
        old, new = scene.objects[item], other.objects[item]
        assert replace(new, material=old.material) == old
        seen.add((item, new.material))
    assert len(seen) == 6, "each object gets each of its three other materials"


def test_a_twin_shows_the_same_cells(groups):
    last = TWIN_EVERY - 1
    for name in ("frame_times", "azimuths_deg"):
        values = getattr(groups, name)
        assert torch.equal(values[last], values[last - 1]), name
    cover, shade = (groups.layers[[last - 1, last]].float() / 255).unbind(dim=3)
    # Materials change the shading; of the shape they change nothing.
    assert (cover[0] - cover[1]).abs().mean() < 0.01
    assert (shade[0] - shade[1]).abs().max() > 0.05
    assert groups.scenes[last].objects[0].shape == groups.scenes[last - 1].objects[0].shape


def test_groups_survive_the_disk(groups, tmp_path):
    save_pair_groups(groups, tmp_path / "pairs.pt")
    loaded = load_pair_groups(tmp_path / "pairs.pt")
    assert loaded.scenes == groups.scenes
    for name in ("frame_times", "azimuths_deg", "layers"):
        assert torch.equal(getattr(loaded, name), getattr(groups, name)), name


def test_the_cameras_are_the_pair_sources_own():
    cfg = FourdPairDataModuleConfig()
    ours = SimpleNamespace(elevation=ELEVATION_DEG, distance=DISTANCE, fovy=FOVY_RAD)
    assert (ours.elevation, ours.distance) == (cfg.elevations_deg, cfg.camera_distance)
    assert pytest.approx(cfg.fovy_deg) == float(torch.rad2deg(torch.tensor(ours.fovy)))
