"""Test and validation of a moving stage, through the real launcher."""

import json

import pytest
import torch
from threestudio.utils.checkpoint import load_checkpoint

import custom.fourd  # noqa: F401 - registers the names
from tests.fixtures.launched import launch, trained

PROMPT = "a red cube sliding"
MOVING = (
    f"system.prompt_processor.prompt={PROMPT}", "data.single_view.static=false",
    "data.single_view.num_frames=8", "data.single_view.test_traj=motion_smooth",
)  # fmt: skip


@pytest.fixture(scope="module")
def run():
    result = trained()
    assert result.status == 0, result.errors
    return result


@pytest.fixture(scope="module")
def tested(run, tmp_path_factory):
    result = launch(
        "--test", tmp_path_factory.mktemp("tested"), f"system.weights={run.checkpoint}", *MOVING,
        "system.test_static=true", "system.test_grid_times=5", "system.test_grid_azimuths=2",
    )  # fmt: skip
    assert result.status == 0, result.errors
    return result


def frames_of(path):
    import av

    with av.open(str(path)) as video:
        return [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]


def metrics_of(folder):
    return json.loads((folder / "save" / "metrics.json").read_text())


def test_the_video_walks_along_the_smooth_path(tested):
    """Eight times and four stops: two views at each, one on the way to the next."""
    assert len(frames_of(tested.folder / "save" / "it2-test.mp4")) == 12
    assert metrics_of(tested.folder)["views"] == 12


def test_each_view_is_also_rendered_at_rest(tested):
    import cv2

    save = tested.folder / "save"
    assert len(frames_of(save / "it2-test_static.mp4")) == 12
    first = [cv2.imread(str(save / f"it2-{what}/0.png")) for what in ("test", "test_static")]
    assert (first[0] == first[1]).all(), "the path begins at time 0"


def test_the_sheet_shows_every_camera_over_time_above_its_truth(tested):
    import cv2

    from custom.fourd.systems.motion_evaluation import ViewTimeGrid, film
    from custom.fourd.world.grammar import parse_caption

    sheet = cv2.imread(str(tested.folder / "save" / "it2-test-sheet.png"))
    assert sheet.shape == (4 * 16, 5 * 16, 3)
    truth = film(parse_caption(PROMPT), ViewTimeGrid.around(2, 5, 16))
    row = torch.cat(list(truth.rgb[1]), dim=1).flip(-1) * 255
    assert (torch.tensor(sheet[48:]).float() - row).abs().max() <= 1


def test_figures_of_motion_are_written(tested):
    metrics = metrics_of(tested.folder)
    assert {"psnr", "alpha_iou", "psnr_grid", "psnr_best_static"} <= metrics.keys()
    assert metrics["motion"].keys() == {"sliding"}
    assert abs(metrics["motion_correlation"]) <= 1 and metrics["motion_amplitude_ratio"] >= 0
    assert (metrics["grid_azimuths"], metrics["grid_times"], metrics["grid_size_px"]) == (2, 5, 16)


def test_a_scene_that_was_never_taught_to_move_is_found_at_rest(tested):
    """The moving part is still its initial noise of 1e-4, which no image shows."""
    metrics = metrics_of(tested.folder)
    assert metrics["motion_amplitude_ratio"] < 0.05
    assert metrics["psnr_best_static"] > metrics["psnr_grid"]


def test_weights_bring_their_seconds_along(run, tested):
    """`system.weights` restores no training state; the figures still say what it took."""
    trained_for = load_checkpoint(run.checkpoint)["train_seconds"]
    assert metrics_of(tested.folder)["seconds"] == pytest.approx(trained_for, abs=0.01) != 0


def test_foreign_words_are_shown_without_figures(run, tmp_path):
    import cv2

    other = launch(
        "--test", tmp_path, f"system.weights={run.checkpoint}", *MOVING,
        "system.prompt_processor.prompt=a dog that runs", "data.single_view.num_frames=4",
        "system.test_grid_times=3",
    )  # fmt: skip
    assert other.status == 0, other.errors
    sheet = cv2.imread(str(other.folder / "save" / "it2-test-sheet.png"))
    assert sheet.shape == (4 * 16, 3 * 16, 3), "renders only"
    assert not {"motion", "psnr_grid", "psnr_best_static"} & metrics_of(other.folder).keys()


def test_validation_writes_a_clip_beside_its_truth(run, tmp_path):
    import cv2

    shown = launch(
        "--validate", tmp_path, f"resume={run.checkpoint}", *MOVING, "system.val_clip_times=4"
    )
    assert shown.status == 0, shown.errors
    save = shown.folder / "save"
    assert cv2.imread(str(save / "it2-0.png")).shape == (48, 32, 3)
    frames = frames_of(save / "it2-clip.mp4")
    assert len(frames) == 4 and frames[0].shape == (16, 32, 3)
    pictures = [cv2.imread(str(save / f"it2-clip/{index}.png")) for index in range(4)]
    assert (pictures[0][:, 16:] != pictures[1][:, 16:]).any(), "the truth moves"


def test_a_clip_of_no_times_is_left_out(run, tmp_path):
    shown = launch(
        "--validate", tmp_path, f"resume={run.checkpoint}", *MOVING, "system.val_clip_times=0"
    )
    assert shown.status == 0, shown.errors
    assert not list((shown.folder / "save").glob("*clip*"))


def test_an_export_with_a_video_tests_the_views_too(run, tmp_path):
    exported = launch(
        "--export", tmp_path, f"resume={run.checkpoint}", "system.exporter.save_video=true",
        "system.geometry.isosurface_resolution=12", "system.geometry.isosurface_threshold=0.1",
        "data.single_view.n_test_views=2",
    )  # fmt: skip
    assert exported.status == 0, exported.errors
    assert len(frames_of(exported.folder / "save" / "it2-test.mp4")) == 2
    assert list((exported.folder / "save").rglob("*.obj"))
