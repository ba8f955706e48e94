"""What `profile=paper` trains with: the values of the published configs, key by key."""

import pytest

from tests.fixtures.launched import planned

SD_BASE, SD = "stabilityai/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-1"
GRIDS = "system.geometry.pos_encoding_config"
MULTI_VIEW, VSD, VIDEO = "system.guidance_multi_view", "system.guidance", "system.guidance_video"

CAMERAS = {
    "elevation_range": [0, 30],
    "fovy_range": [15, 60],
    "camera_distance_range": [2.5, 3.0],
    "camera_perturb": 0.0,
    "center_perturb": 0.0,
    "up_perturb": 0.0,
    "resolution_milestones": [5000],
    "eval_camera_distance": 3.0,
    "eval_fovy_deg": 40.0,
    "eval_height": 256,
    "eval_width": 256,
}
EVERY_STAGE = {
    **{f"data.single_view.{key}": value for key, value in CAMERAS.items()},
    **{f"data.multi_view.{key}": value for key, value in CAMERAS.items()},
    "data.single_view.batch_size": [1, 1],
    "data.single_view.width": [256, 256],
    "data.single_view.height": [256, 256],
    "data.multi_view.n_view": 4,
    "data.multi_view.relative_radius": False,
    "system.geometry_type": "implicit-volume",
    "system.geometry.radius": 1.0,
    "system.geometry.density_bias": "blob_magic3d",
    "system.geometry.density_activation": "softplus",
    "system.geometry.density_blob_scale": 10.0,
    "system.geometry.density_blob_std": 0.5,
    "system.geometry.normal_type": "finite_difference",
    f"{GRIDS}.otype": "HashGridSpatialTime",
    f"{GRIDS}.n_levels": 16,
    f"{GRIDS}.n_features_per_level": 2,
    f"{GRIDS}.log2_hashmap_size": 19,
    f"{GRIDS}.base_resolution": 16,
    f"{GRIDS}.per_level_scale": 1.447269237440378,
    "system.material.color_activation": "sigmoid",
    "system.background_type": "neural-environment-map-background",
    "system.background.random_aug": True,
    "system.renderer_type": "nerf-volume-renderer",
    "system.renderer.num_samples_per_ray": 512,
    "system.prompt_processor.front_threshold": 30.0,
    "system.prompt_processor.back_threshold": 30.0,
    f"{MULTI_VIEW}.guidance_scale": 50.0,
    f"{MULTI_VIEW}.recon_loss": True,
    f"{MULTI_VIEW}.recon_std_rescale": 0.5,
    f"{MULTI_VIEW}.model_name": "sd-v2.1-base-4view",
    "system.loss.lambda_sds": 1.0,
    "system.loss.lambda_sparsity": 10.0,
    "system.loss.lambda_opaque": [10000, 0.0, 1000.0, 10001],
    "system.loss.lambda_orient": 0.0,
    "system.loss.lambda_z_variance": 0.0,
    "system.optimizer.name": "AdamW",
    "system.optimizer.args.betas": [0.9, 0.99],
    "system.optimizer.args.eps": 1e-15,
    "trainer.precision": 32,
    "trainer.val_check_interval": 1000,
    "checkpoint.save_last": True,
    "checkpoint.save_top_k": 0,
}
STAGE_1 = {
    "data.prob_multi_view": 1.0,
    "data.single_view.static": True,
    "data.multi_view.batch_size": [8, 4],
    "data.multi_view.width": [64, 256],
    "data.multi_view.height": [64, 256],
    f"{MULTI_VIEW}.min_step_percent": [0, 0.98, 0.02, 8000],
    f"{MULTI_VIEW}.max_step_percent": [0, 0.98, 0.5, 8000],
    "trainer.max_steps": 10000,
}
STAGE_2 = {
    "data.prob_multi_view": 0.5,
    "data.single_view.static": True,
    "data.multi_view.batch_size": [4, 4],
    "data.multi_view.width": [64, 256],
    f"{MULTI_VIEW}.min_step_percent": 0.02,
    f"{MULTI_VIEW}.max_step_percent": 0.5,
    "system.guidance_type": "stable-diffusion-vsd-guidance",
    f"{VSD}.pretrained_model_name_or_path": SD_BASE,
    f"{VSD}.pretrained_model_name_or_path_lora": SD,
    f"{VSD}.guidance_scale": 7.5,
    f"{VSD}.guidance_scale_lora": 1.0,
    f"{VSD}.lora_cfg_training": True,
    f"{VSD}.lora_n_timestamp_samples": 1,
    f"{VSD}.camera_condition_type": "extrinsics",
    f"{VSD}.min_step_percent": 0.02,
    f"{VSD}.max_step_percent": 0.5,
    "system.loss.lambda_vsd": 1.0,
    "system.loss.lambda_lora": 1.0,
    "trainer.max_steps": 25000,
}
STAGE_3 = {
    **{key: value for key, value in STAGE_2.items() if key.startswith("system.guidance")},
    "data.prob_multi_view": 0.5,
    "data.single_view.prob_single_view_video": 0.5,
    "data.single_view.simultan": True,
    "data.single_view.static": False,
    "data.single_view.num_frames": 16,
    "data.single_view.sample_rand_frames": "t0",
    "data.single_view.width_vid": 288,
    "data.single_view.height_vid": 160,
    "data.single_view.num_frames_factor": 4,
    "data.single_view.test_traj": "motion_smooth",
    "data.multi_view.num_frames": 16,
    "data.multi_view.sample_rand_frames": "t0",
    "data.multi_view.batch_size": [4, 4],
    "data.multi_view.width": [256, 256],
    "data.multi_view.height": [256, 256],
    f"{GRIDS}.static": False,
    "system.geometry.anneal_density_blob_std_config": {
        "min_anneal_step": 0, "max_anneal_step": 50000, "start_val": 0.5, "end_val": 5.0,
    },
    "system.prompt_processor_type_video": "zeroscope-prompt-processor",
    "system.guidance_type_video": "zeroscope-guidance",
    f"{VIDEO}.pretrained_model_name_or_path": "cerspense/zeroscope_v2_576w",
    f"{VIDEO}.guidance_scale": 100.0,
    f"{VIDEO}.weighting_strategy": "sds",
    f"{VIDEO}.min_step_percent": 0.02,
    f"{VIDEO}.max_step_percent": 0.98,
    f"{VIDEO}.low_ram_vae": -1,
    "system.loss.lambda_sds_video": 0.1,
    "system.loss.lambda_deformation": 0.0,
    "system.freeze_static_modules": False,
    "trainer.max_steps": 100000,
}  # fmt: skip
REST = {"geometry.density_network": 1e-3, "geometry.feature_network": 1e-3, "background": 1e-3}
ENCODING = "geometry.encoding.encoding"
RATES = {
    "fourdfy_stage_1": {"geometry.encoding": 0.01, **REST},
    "fourdfy_stage_2": {"geometry.encoding": 0.01, **REST, "guidance_single_view": 1e-4},
    "fourdfy_stage_3": {
        f"{ENCODING}.encoding": 1e-4,
        f"{ENCODING}.encoding_time": 0.01,
        **REST,
        "guidance_single_view": 1e-4,
    },
    "fourdfy_stage_3_deformation": {
        f"{ENCODING}.encoding_time": 1e-3,
        f"{ENCODING}.time_network": 1e-4,
    },
    # Planes and lines had 0.02, the basis and the network 1e-3.
    "instruct4d_train": {
        "geometry.encoding": 0.02,
        "geometry.density_network": 1e-3,
        "geometry.feature_network": 1e-3,
    },
}
DEFORMATION = {
    f"{GRIDS}.otype": "HashGridSpatialTimeDeform",
    f"{GRIDS}.n_levels": 16,
    f"{GRIDS}.log2_hashmap_size": 19,
    f"{GRIDS}.time_encoding_config.n_levels": 8,
    f"{GRIDS}.time_encoding_config.n_features_per_level": 2,
    f"{GRIDS}.time_encoding_config.log2_hashmap_size": 19,
    f"{GRIDS}.time_encoding_config.base_resolution": 4,
    f"{GRIDS}.time_encoding_config.per_level_scale": 1.447269237440378,
    f"{GRIDS}.time_network_config.n_neurons": 64,
    f"{GRIDS}.time_network_config.n_hidden_layers": 2,
}
PUBLISHED = {
    "fourdfy_stage_1": {**EVERY_STAGE, **STAGE_1},
    "fourdfy_stage_2": {**EVERY_STAGE, **STAGE_2},
    "fourdfy_stage_3": {**EVERY_STAGE, **STAGE_3},
    "fourdfy_stage_1_deformation": {**STAGE_1, **DEFORMATION},
    "fourdfy_stage_3_deformation": {
        **DEFORMATION,
        "data.single_view.prob_single_view_video": 1.0,
        "system.freeze_static_modules": True,
        "system.loss.lambda_sds_video": 1.0,
        "system.loss.lambda_deformation": 100.0,
        "system.loss.lambda_sparsity": 0.0,
        "system.loss.lambda_opaque": 0.0,
        "trainer.max_steps": 150000,
    },
    "fourdfy_stage_3_vc": {
        "data.single_view.prob_single_view_video": 0.5,
        "data.single_view.width_vid": 128,
        "data.single_view.height_vid": 80,
        "system.freeze_static_modules": True,
        "system.background.random_aug": False,
        "system.renderer_type": "stable-nerf-volume-renderer",
        "system.renderer.base_renderer_type": "mask-nerf-volume-renderer",
        "system.renderer.base_renderer.train_max_nums": 100000,
        "system.renderer.base_renderer.train_max_nums_static": 100000,
        "system.prompt_processor_type_video": "videocrafter-prompt-processor",
        "system.prompt_processor_video.negative_prompt": (
            "low motion, static statue, not moving, no motion"
        ),
        "system.guidance_type_video": "videocrafter-guidance",
        f"{VIDEO}.pretrained_model_name_or_path": "VideoCrafter/VideoCrafter2",
        f"{VIDEO}.guidance_scale": 100.0,
        f"{VIDEO}.weighting_strategy": "sds",
        f"{VIDEO}.motion_amp_scale": 30.0,
        f"{VIDEO}.fps": 8,
        f"{VIDEO}.half_precision_weights": False,
        f"{VIDEO}.min_step_percent": 0.02,
        f"{VIDEO}.max_step_percent": [0, 0.98, 0.5, 5000],
        f"{VIDEO}.low_ram_vae": 2,
        "system.loss.lambda_sds_video": 0.1,
        "trainer.max_steps": 200000,
        "trainer.precision": "16-mixed",
    },
    "instruct4d_train": {  # coffee_martini in 50 frames of half the size
        "data_type": "dynerf-datamodule",
        "data.downsample": 2,
        "data.frame_list": 50,
        "data.batch_size": 4096,
        "data.motion_share": 0.1,
        "data.one_time_per_batch": True,
        "data.hold_out_cameras": [0],  # the release trained on it as well
        "system.color_loss": "mse",
        "system.optimizer.name": "Adam",
        "system.optimizer.args.betas": [0.9, 0.99],
        "system.scheduler.name": "ExponentialLR",
        "system.scheduler.args.gamma": 0.1 ** (1 / 100000),  # to a tenth over the run
        "trainer.max_steps": 100000,
        "seed": 20211202,
    },
}


def plan(name: str, profile: str) -> dict:
    return planned(f"custom/configs/{name}.yaml", profile)


def look_up(cfg: dict, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def rates(cfg: dict) -> dict[str, float]:
    groups = cfg["system"]["optimizer"]["params"]
    return {name: group["lr"] for name, group in groups.items() if group is not None}


@pytest.mark.parametrize("name", PUBLISHED)
def test_paper_is_what_was_published(name):
    cfg = plan(name, "paper")
    wrong = {
        key: (look_up(cfg, key), value)
        for key, value in PUBLISHED[name].items()
        if look_up(cfg, key) != value
    }
    assert wrong == {}
    if name in RATES:
        assert rates(cfg) == RATES[name]


def test_low_vram_is_the_way_without_stage_2_and_vsd():
    cfg = plan("fourdfy_stage_3", "low_vram")
    assert look_up(cfg, "data.prob_multi_view") == look_up(cfg, "system.prob_multi_view") == 0.75
    single_view = look_up(cfg, "data.single_view")
    assert single_view["prob_single_view_video"] == cfg["system"]["prob_single_view_video"] == 1.0
    assert (single_view["width_vid"], single_view["height_vid"]) == (144, 80)
    assert single_view["num_frames"] == 16
    assert look_up(cfg, "system.renderer.num_samples_per_ray") <= 256
    assert "guidance_single_view" not in rates(cfg)
    assert cfg["trainer"]["precision"] == "16-mixed"


@pytest.mark.parametrize(
    ("profile", "suffix"),
    [("embedded", ""), ("low_vram", ""), ("paper", ""), ("embedded", "_deformation")],
)
def test_all_stages_build_the_same_scene(profile, suffix):
    """Of equal shapes, so that weights carry over; and from the same words."""
    first, *others = (
        plan(f"fourdfy_stage_{number}{suffix}", profile)["system"] for number in (1, 2, 3)
    )
    for system in others:
        assert system["background_type"] == first["background_type"]
        assert system["background"] == first["background"]
        assert system["geometry_type"] == first["geometry_type"]
        assert shape_of(system["geometry"]) == shape_of(first["geometry"])
        assert system["prompt_processor"]["prompt"] == first["prompt_processor"]["prompt"]


def shape_of(geometry: dict) -> dict:
    """What the sizes of a geometry's tensors depend on."""
    encoding = {k: v for k, v in geometry["pos_encoding_config"].items() if k != "static"}
    return {"encoding": encoding, "network": geometry.get("mlp_network_config")}
