"""What all data modules of videos share: loaders that resume, validation views, keys."""

from types import SimpleNamespace

import pytest
import torch

from custom.fourd.data.video_frames import FrameSource
from custom.fourd.data.video_scene import VideoScene
from custom.fourd.data.video_scene_datamodule import (
    VideoSceneDataModule,
    choose_cameras,
    choose_frames,
    stack_cameras,
)
from custom.fourd.world.writers import write_mp4


class TwoCameras(VideoSceneDataModule):
    """A reader of nothing: two cameras of grey frames, one held out."""

    reads = 0

    def read_scene(self):
        self.reads += 1
        ids = torch.arange(2).repeat_interleave(10)
        grey = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1)
        return VideoScene(
            frames=grey.expand(20, 4, 6, 3).contiguous(),
            c2w=torch.eye(4).repeat(20, 1, 1),
            intrinsics=torch.tensor([[5.0, 0, 3], [0, 5.0, 2], [0, 0, 1]]).repeat(20, 1, 1),
            camera_ids=ids,
            time_ids=torch.arange(10).repeat(2),
            frame_times=torch.linspace(0, 1, 10).repeat(2),
            held_out=ids == 1,
            near=0.1,
            far=2.0,
            train_on_held_out=self.cfg.parity,
        )


def module(folder, **keys):
    return TwoCameras({"dataroot": str(folder), "batch_size": 8} | keys)


def test_training_continues_at_the_trainer_s_step(tmp_path):
    """A fresh run's third step and the first step of a run resumed there are one batch."""
    fresh = module(tmp_path)
    fresh.setup("fit")
    stream = iter(fresh.train_dataloader())
    batches = [next(stream) for _ in range(3)]
    assert [batch["step"] for batch in batches] == [0, 1, 2]
    resumed = module(tmp_path)
    resumed.setup("fit")
    place = {"global_step": 2, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1}
    resumed.train_dataset.attach_trainer(SimpleNamespace(**place))
    batch = resumed.train_dataset.collate(next(iter(resumed.train_dataset)))
    for key in ("index", "pixels", "rgb", "rays_d"):
        assert torch.equal(batch[key], batches[2][key])


def test_ranks_and_accumulated_batches_draw_apart(tmp_path):
    data = module(tmp_path)
    data.setup("fit")
    dataset, drawn = data.train_dataset, []
    for rank in (0, 1):
        place = {"global_step": 0, "accumulate_grad_batches": 2}
        place |= {"global_rank": rank, "world_size": 2}
        dataset.attach_trainer(SimpleNamespace(**place))
        stream = iter(dataset)
        places = [next(stream) for _ in range(3)]
        assert [item["step"] for item in places] == [0, 0, 1]
        drawn += [tuple(dataset.collate(item)["pixels"].flatten().tolist()) for item in places[:2]]
    assert len(set(drawn)) == 4


def test_validation_spreads_over_the_held_out_frames_and_the_test_takes_all(tmp_path):
    data = module(tmp_path, n_val_views=4)
    data.setup()
    assert data.val_dataset.rows.tolist() == [10, 13, 16, 19]
    assert data.test_dataset.rows.tolist() == list(range(10, 20))
    assert data.reads == 1, "the scene is read once for all stages"
    batch = list(data.val_dataloader())[1]
    assert batch["index"].tolist() == [1] and batch["rows"].tolist() == [13]
    assert batch["rgb"].shape == (1, 4, 6, 3)
    assert float(batch["rgb"][0, 0, 0, 0]) == pytest.approx(13 / 255)
    assert len(data.predict_dataloader()) == 10
    with pytest.raises(IndexError, match="view 4 of 4"):
        data.val_dataset[4]


def test_parity_is_announced(tmp_path, monkeypatch):
    import threestudio

    said = []
    monkeypatch.setattr(threestudio, "warn", lambda text, *args: said.append(text))
    assert len(module(tmp_path, parity=True).scene.train_rows()) == 20
    assert len(said) == 1 and "metrics on them are no test" in said[0]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"dataroot": ""}, "data.dataroot is empty"),
        ({"dataroot": "no/such"}, "data.dataroot is 'no/such', which does not exist"),
        ({"downsample": 0.5}, "data.downsample has the value 0.5"),
        ({"motion_share": 1.5}, "data.motion_share has the value 1.5"),
        ({"batch_size": 0}, "data.batch_size has the value 0"),
        ({"patch_size": 0}, "data.patch_size has the value 0"),
        ({"n_val_views": 0}, "data.n_val_views has the value 0"),
        ({"motion_until": -1}, "data.motion_until has the value -1"),
    ],
)
def test_keys_that_cannot_work_are_refused(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        module(**{"folder": tmp_path} | keys)


def test_a_module_without_a_reader_says_so(tmp_path):
    with pytest.raises(NotImplementedError, match="VideoSceneDataModule has no reader"):
        _ = VideoSceneDataModule({"dataroot": str(tmp_path)}).scene


def test_cameras_are_chosen_by_position_or_name():
    names = ["cam00", "cam02", "cam10"]
    assert choose_cameras([0, "cam10"], names, "data.x") == {0, 2}
    assert choose_cameras("cam02", names, "data.x") == {1}
    assert choose_cameras(None, names, "data.x") == choose_cameras([], names, "data.x") == set()
    for wrong in ([3], [-1], ["cam01"], [True], [0.0]):
        with pytest.raises(ValueError, match="data.x names camera"):
            choose_cameras(wrong, names, "data.x")


def test_cameras_are_stacked_by_camera_and_time(tmp_path):
    for camera in range(2):
        grey = torch.tensor([40, 80, 120], dtype=torch.uint8) + 10 * camera
        frames = grey.view(-1, 1, 1, 1).expand(3, 16, 16, 3).contiguous()
        write_mp4(tmp_path / f"cam{camera}.mp4", frames)
    sources = [FrameSource(tmp_path / f"cam{camera}.mp4") for camera in range(2)]
    chosen = choose_frames(sources, "[0, 2]", "data.frame_list")
    parts = stack_cameras(sources, chosen, 8, 8)
    means = parts["frames"].float().mean(dim=(1, 2, 3)).tolist()
    assert means == pytest.approx([40, 120, 50, 130], abs=1.5)
    assert parts["camera_ids"].tolist() == [0, 0, 1, 1]
    assert parts["time_ids"].tolist() == [0, 1, 0, 1]
    assert parts["frame_times"].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert parts["names"][3].endswith("cam1.mp4 frame 2")
