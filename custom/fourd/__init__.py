"""fourd: text to moving 3D scenes, as a threestudio extension.

Importing the package only tells the registry where each module is; see `REGISTRY`. A module is
imported, and with it lightning or a diffusion library, when a config first names it.
"""

from pathlib import Path

import threestudio
from packaging.version import Version
from threestudio.models.guidance.multiview_facts import register_camera_vector
from threestudio.utils.diffusers_folder import register_model_class
from threestudio.utils.pretrained import (
    register_doctor,
    register_embedded_root,
    register_model_table,
)

if Version(threestudio.__version__) < Version("0.3.0"):
    raise ImportError(
        f"threestudio is {threestudio.__version__}; expected 0.3.0 or later. "
        "Run `pip install -e extern/threestudio`."
    )

# Registered name to the module that registers it, relative to this package.
REGISTRY: dict[str, str] = {
    "anchor-instructpix2pix-guidance": "guidance.anchor_instructpix2pix_guidance",
    "animatediff-guidance": "guidance.animatediff_guidance",
    "dycheck-datamodule": "data.dycheck_datamodule",
    "dynerf-datamodule": "data.dynerf_datamodule",
    "fourd-pair-datamodule": "data.fourd_pair_datamodule",
    "fourd-reconstruction-system": "systems.fourd_reconstruction_system",
    "fourdfy-system": "systems.fourdfy_system",
    "instruct4d-system": "systems.instruct4d_system",
    "instruction-prompt-processor": "prompts.instruction_prompt_processor",
    "joint-frames-guidance": "guidance.joint_frames_guidance",
    "mask-nerf-volume-renderer": "renderers.mask_nerf_volume_renderer",
    "multiview-diffusion-guidance": "guidance.multiview_diffusion_guidance",
    "random-multiview-camera-datamodule": "data.random_multiview_camera_datamodule",
    "scene-exporter": "systems.scene_exporter",
    "single-multiview-combined-camera-datamodule": (
        "data.single_multiview_combined_camera_datamodule"
    ),
    "single-view-camera-datamodule": "data.single_view_camera_datamodule",
    "stable-nerf-volume-renderer": "renderers.stable_nerf_volume_renderer",
    "time-mapper-system": "systems.time_mapper_system",
    "time-view-mapper-system": "systems.time_view_mapper_system",
    "transforms-datamodule": "data.transforms_datamodule",
    "video-file-datamodule": "data.video_file_datamodule",
    "videocrafter-guidance": "guidance.videocrafter_guidance",
    "videocrafter-prompt-processor": "prompts.videocrafter_prompt_processor",
    "view-mapper-system": "systems.view_mapper_system",
    "wan-guidance": "guidance.wan_guidance",
    "wan-prompt-processor": "prompts.wan_prompt_processor",
    "zeroscope-guidance": "guidance.zeroscope_guidance",
    "zeroscope-prompt-processor": "prompts.zeroscope_prompt_processor",
}

for _name, _module in REGISTRY.items():
    threestudio.register_lazy(_name, f"{__name__}.{_module}")

_package_folder = Path(__file__).parent
register_embedded_root(_package_folder / "assets")
register_doctor("python -m custom.fourd.scripts.doctor")
register_model_table(_package_folder.parents[1] / "configs" / "models.yaml")
register_model_class("PatchAutoencoder", f"{__name__}.diffusion.patch_autoencoder:PatchAutoencoder")
register_model_class("CLIPVisionModelWithProjection", "transformers:CLIPVisionModelWithProjection")
# The other two names are what public conversions of VideoCrafter2 call the same network.
for _name in ("VideoCrafterUNet", "UNetVideoCrafter", "UNet3DVideoCrafterConditionModel"):
    register_model_class(_name, f"{__name__}.diffusion.videocrafter_unet:VideoCrafterUNet")
for _kind in ("mvdream", "embedded"):
    register_camera_vector(_kind, f"{__name__}.diffusion.camera_vector:camera_vector")
