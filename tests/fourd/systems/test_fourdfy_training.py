"""Stage 3 of 4D-fy on tiny random priors: what each kind of step draws, renders and trains."""

import copy

import pytest
import pytorch_lightning as pl
import threestudio
import torch
from threestudio.utils.checkpoint import load_checkpoint
from threestudio.utils.rng import generator, set_experiment_seed

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.data.single_view_camera_datamodule import draw_guidance_choice
from custom.fourd.losses.deformation import deformation_loss
from tests.fixtures.model_folders import write_multiview_folder, write_stable_diffusion_folder
from tests.fixtures.video_folders import write_zeroscope_folder

FRAMES = 4
GRID = {"n_levels": 2, "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5}
CAMERAS = {
    "num_frames": FRAMES, "sample_rand_frames": "t0", "height": 8, "width": 8,
    "camera_distance_range": [2.5, 3.0], "fovy_range": [40, 40], "elevation_range": [0, 30],
}  # fmt: skip
DATA = {
    "prob_multi_view": 0.4,
    "single_view": {
        **CAMERAS, "batch_size": 1, "static": False, "simultan": True,
        "prob_single_view_video": 0.6, "width_vid": 8, "height_vid": 6,
    },
    "multi_view": {**CAMERAS, "batch_size": 4, "n_view": 4},
}  # fmt: skip
TIME_GRID = "geometry.encoding.encoding.encoding_time"
STATIC_GRID = "geometry.encoding.encoding.encoding"
SCENE_GROUPS = {STATIC_GRID: 0.01, "geometry.density_network": 0.01,
                "geometry.feature_network": 0.01, "background": 0.01}  # fmt: skip
DEFORM = {
    "otype": "HashGridSpatialTimeDeform",
    "time_encoding_config": {"otype": "HashGrid", **GRID},
    "time_network_config": {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1},
}
STEPS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("priors")
    return {
        "": write_stable_diffusion_folder(root / "sd"),
        "_multi_view": write_multiview_folder(root / "mv"),
        "_video": write_zeroscope_folder(root / "video"),
    }


def system_config(folders, encoding=None, groups=None, **keys):
    config = {
        "prob_multi_view": 0.4,
        "prob_single_view_video": 0.6,
        "simultan": True,
        "geometry_type": "implicit-volume",
        "geometry": {
            "pos_encoding_config": {
                "otype": "HashGridSpatialTime", "static": False, **GRID, **(encoding or {}),
            },
            "mlp_network_config": {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1},
        },
        "material_type": "no-material",
        "background_type": "neural-environment-map-background",
        "background": {"random_aug": True},
        "renderer_type": "nerf-volume-renderer",
        "renderer": {"num_samples_per_ray": 12, "occupancy_resolution": 4},
        "guidance_type": "stable-diffusion-vsd-guidance",
        "guidance": {"pretrained_model_name_or_path_lora": str(folders[""]), "image_size": 16},
        "guidance_type_multi_view": "multiview-diffusion-guidance",
        "guidance_multi_view": {},
        "guidance_type_video": "zeroscope-guidance",
        "guidance_video": {"width": 16, "height": 16, "motion_amp_scale": 2.0},
        "loss": {
            "lambda_sds": 1.0, "lambda_sds_video": 0.1, "lambda_vsd": 1.0, "lambda_lora": 1.0,
            "lambda_sparsity": 1.0,
        },
        "optimizer": {
            "name": "AdamW",
            "args": {"betas": [0.9, 0.99]},
            "params": {
                name: {"lr": lr}
                for name, lr in (
                    groups or {**SCENE_GROUPS, TIME_GRID: 0.01, "guidance_single_view": 0.001}
                ).items()
            },
        },
    }  # fmt: skip
    for suffix, folder in folders.items():
        config[f"guidance{suffix}"]["pretrained_model_name_or_path"] = str(folder)
        config[f"prompt_processor_type{suffix}"] = "stable-diffusion-prompt-processor"
        config[f"prompt_processor{suffix}"] = {
            "prompt": "a red cube", "use_cache": False, "spawn": False,
            "pretrained_model_name_or_path": str(folder),
        }  # fmt: skip
    return config | keys


class Watch(pl.Callback):
    """What each step was, what it rendered, and which parts of the system it moved."""

    def __init__(self):
        self.kinds, self.rendered, self.moved = [], [], []

    def on_fit_start(self, trainer, system):
        system.renderer.register_forward_pre_hook(
            lambda _, args, batch: self.rendered.append(batch), with_kwargs=True
        )

    def on_train_batch_start(self, trainer, system, batch, batch_idx):
        self.kinds.append(
            "video" if batch["is_video"] else "image" if batch["single_view"] else "multi_view"
        )
        self._before = self._state(trainer, system)

    def on_train_batch_end(self, trainer, system, outputs, batch, batch_idx):
        after = self._state(trainer, system)
        self.moved.append(
            {key for key, value in after.items() if not torch.equal(value, self._before[key])}
        )

    def _state(self, trainer, system):
        """Copies of all parameters, and of the optimizer's memory of the 4D grid."""
        state = {name: param.detach().clone() for name, param in system.named_parameters()}
        grid = next(p for name, p in system.named_parameters() if name.startswith(TIME_GRID))
        memory = trainer.optimizers[0].state.get(grid, {})
        empty = torch.zeros(())
        for key in ("step", "exp_avg", "exp_avg_sq"):
            state[f"memory.{key}"] = memory.get(key, empty).clone()
        return state


def fit(config, steps=STEPS, data=DATA):
    set_experiment_seed(0)
    system, watch = threestudio.find("fourdfy-system")(config), Watch()
    datamodule = threestudio.find("single-multiview-combined-camera-datamodule")(data)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(system, datamodule)
    return system, trainer, watch


@pytest.fixture(scope="module")
def stage_3(folders):
    return fit(system_config(folders))


def steps_of(watch, *kinds):
    return [step for step, kind in enumerate(watch.kinds) if kind in kinds]


# The draw of a step


def test_every_step_has_the_guidance_that_the_data_module_drew(stage_3):
    _, _, watch = stage_3
    expected = []
    for step in range(STEPS):
        first, second = draw_guidance_choice(step)
        expected.append("multi_view" if first < 0.4 else "video" if second < 0.6 else "image")
    assert watch.kinds == expected and set(expected) == {"multi_view", "video", "image"}


def test_all_priors_stand_under_upstreams_names(stage_3):
    system, _, _ = stage_3
    assert system.guidance is system.guidance_multi_view
    assert type(system.guidance_single_view).__name__ == "StableDiffusionVSDGuidance"
    assert system.guidance_video.cfg.motion_amp_scale == 2.0
    roots = {key.split(".")[0] for key in system.state_dict()}
    assert roots == {"geometry", "background", "renderer", "guidance_single_view"}


# What is rendered


def test_clips_are_one_camera_at_all_times_of_the_step(stage_3):
    _, _, watch = stage_3
    for step in steps_of(watch, "video"):
        batch = watch.rendered[step]
        offset = torch.rand((), generator=generator("frame-times", step))
        times = (torch.arange(FRAMES) + offset) / FRAMES
        torch.testing.assert_close(batch["frame_times"], times)
        assert batch["rays_d"].shape == (FRAMES, 6, 8, 3)
        assert torch.equal(batch["rays_d"], batch["rays_d"][:1].expand(FRAMES, -1, -1, -1))
        assert batch["num_frames"] == batch["images_per_group"] == FRAMES


def test_images_and_view_groups_show_one_time_of_the_step(stage_3):
    _, _, watch = stage_3
    places = set()
    for step in steps_of(watch, "image", "multi_view"):
        batch = watch.rendered[step]
        n_images = batch["rays_d"].shape[0]
        assert n_images == (4 if watch.kinds[step] == "multi_view" else 1)
        assert batch["frame_times"].shape == (n_images,)
        assert batch["frame_times"].unique().numel() == 1
        place = torch.randint(FRAMES, (), generator=generator("image-time", step))
        assert batch["frame_times"][0] == batch["frame_times_video"][place]
        places.add(int(place))
    assert len(places) > 1


def test_the_frames_of_a_clip_have_one_background(stage_3):
    system, _, watch = stage_3
    replaced = 0
    for step in steps_of(watch, "video"):
        system.do_update_step(0, step)
        background = system.renderer.train()(**watch.rendered[step])["comp_rgb_bg"]
        assert torch.equal(background, background[:1].expand_as(background))
        replaced += int(background.flatten(0, 2).unique(dim=0).shape[0] == 1)
    assert 0 < replaced, "at least one clip must have met a random colour"


def test_a_number_fixes_the_time_of_images(folders):
    system = threestudio.find("fourdfy-system")(system_config(folders, image_frame_time=0.25))
    batch = {"rays_o": torch.zeros(4, 1, 1, 3), "frame_times": torch.linspace(0, 1, 5)}
    assert system.batch_in_time(batch)["frame_times"].tolist() == [0.25] * 4
    del batch["frame_times"]
    system.cfg.image_frame_time = None
    assert system.batch_in_time(batch)["frame_times"].tolist() == [0.0] * 4
    with pytest.raises(ValueError, match=r"image_frame_time is 1.5; expected a scene time in"):
        threestudio.find("fourdfy-system")(system_config(folders, image_frame_time=1.5))


# What trains


def test_only_clips_move_the_4d_grid(stage_3):
    """To the bit: weights with their decay, both moments and the count of steps."""
    _, _, watch = stage_3
    grid = {f"{TIME_GRID}.params", "memory.step", "memory.exp_avg", "memory.exp_avg_sq"}
    videos = steps_of(watch, "video")
    for step, moved in enumerate(watch.moved):
        assert moved & grid == (grid if step in videos else set()), step
    after_motion = [s for s in steps_of(watch, "image", "multi_view") if s > videos[0]]
    assert after_motion, "an image step must follow a clip, or the moments have nothing to lose"


def test_the_static_scene_trains_in_all_steps_and_the_lora_on_images(stage_3):
    _, _, watch = stage_3
    for kind, moved in zip(watch.kinds, watch.moved, strict=True):
        assert f"{STATIC_GRID}.params" in moved
        assert "geometry.density_network.layers.0.weight" in moved
        assert any(name.startswith("guidance_single_view") for name in moved) == (kind == "image")


def test_frozen_scenes_move_in_all_kinds_of_steps(folders):
    groups = {TIME_GRID: 0.01, "guidance_single_view": 0.001}
    config = system_config(folders, groups=groups, freeze_static_modules=True)
    _, _, watch = fit(config, steps=6)
    assert len(set(watch.kinds)) == 3
    for moved in watch.moved:
        assert f"{TIME_GRID}.params" in moved
        assert not any(name.startswith(("geometry.", "background.")) for name in
                       moved - {f"{TIME_GRID}.params"})  # fmt: skip


def test_frozen_groups_are_refused_unless_the_config_may_be_foreign(folders):
    config = system_config(folders, prob_multi_view=1.0, freeze_static_modules=True)
    del config["optimizer"]["params"]["guidance_single_view"]
    system = threestudio.find("fourdfy-system")(config)
    system.setup("fit")
    with pytest.raises(ValueError, match="which has no parameter that requires a gradient"):
        system.configure_optimizers()
    system.profile = "as-written"
    groups = system.configure_optimizers()["optimizer"].param_groups
    assert [group["name"] for group in groups] == [TIME_GRID]


def test_clips_need_a_scene_that_moves(folders):
    system = threestudio.find("fourdfy-system")(system_config(folders, {"static": True}))
    with pytest.raises(ValueError, match="36% of the steps show clips, but the geometry is static"):
        system.setup("fit")


# Losses


def test_displacements_are_smoothed_on_clips(folders):
    groups = {TIME_GRID: 0.01, "geometry.encoding.encoding.time_network": 0.01}
    loss = {"lambda_sds": 0.0, "lambda_sds_video": 0.0, "lambda_deformation": 10.0}
    config = system_config(
        folders, DEFORM, groups, freeze_static_modules=True, loss=loss, prob_multi_view=0.0,
        prob_single_view_video=1.0,
    )  # fmt: skip
    system, logged = threestudio.find("fourdfy-system")(config), {}
    system.setup("fit")
    system.log = lambda name, value, **_: logged.update({name: value})
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in system.geometry.encoding.encoding.named_parameters():
            if "time" in name:
                parameter.normal_(generator=stream)
    batch = clip_of(system)
    system.do_update_step(0, 0)
    result = system.training_step(batch, 0)["loss"]
    out = system.renderer(**system.batch_in_time(batch))
    expected = deformation_loss(out["deformation"])
    assert expected > 0
    torch.testing.assert_close(logged["train/loss_deformation"], expected)
    torch.testing.assert_close(result, 10.0 * expected)
    result.backward()
    assert system.geometry.encoding.encoding.time_network.layers[0].weight.grad.any()


def clip_of(system):
    datamodule = threestudio.find("single-view-camera-datamodule")
    config = {**DATA["single_view"], "prob_single_view_video": 1.0}
    dataset = datamodule(config).build_train_dataset()
    system.set_resume_status(0, 0)
    return dataset.collate({"step": 0})


def test_a_smoothed_scene_must_displace_points(folders):
    keys = {"loss": {"lambda_sds_video": 1.0, "lambda_deformation": 1.0}}
    config = system_config(folders, **keys, prob_multi_view=0.0, prob_single_view_video=1.0)
    system = threestudio.find("fourdfy-system")(config)
    system.setup("fit")
    system.log = lambda *_, **__: None
    with pytest.raises(ValueError, match="lambda_deformation needs a geometry that displaces"):
        system.training_step(clip_of(system), 0)
    system.cfg.loss = {}
    with pytest.raises(ValueError, match="system.loss has no lambda_sds_video"):
        system.training_step(clip_of(system), 0)


# From stage to stage


def test_weights_carry_over_and_optimizer_and_schedules_do_not(folders, stage_3, tmp_path):
    system, trainer, _ = stage_3
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    config = system_config(folders, weights=str(tmp_path / "last.ckpt"))
    following = threestudio.find("fourdfy-system")(copy.deepcopy(config))
    following.setup("fit")
    for name, value in system.state_dict().items():
        assert torch.equal(following.state_dict()[name], value), name
    assert any("lora" in name for name in following.state_dict())
    optimizer = following.configure_optimizers()["optimizer"]
    assert not optimizer.state and following.true_global_step == 0


def test_the_blobs_width_survives_a_reload_and_starts_anew_in_training(folders, tmp_path):
    anneal = {"min_anneal_step": 0, "max_anneal_step": 2, "start_val": 0.5, "end_val": 5.0}
    config = system_config(folders, prob_multi_view=1.0)
    del config["optimizer"]["params"]["guidance_single_view"]
    config["geometry"]["anneal_density_blob_std_config"] = anneal
    only_views = {**DATA, "prob_multi_view": 1.0}
    system, trainer, _ = fit(config, steps=4, data=only_views)
    assert system.geometry.density_blob_std == 5.0
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4
    again = threestudio.find("fourdfy-system")(config | {"weights": str(tmp_path / "last.ckpt")})
    again.eval().do_update_step(0, 0)  # as a test of the weights alone does
    assert again.geometry.density_blob_std == 5.0
    again.train().do_update_step(0, 0)
    assert again.geometry.density_blob_std == 0.5
    again.do_update_step(0, 1)
    assert again.geometry.density_blob_std == 2.75
