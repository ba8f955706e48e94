"""The built-in modules by registered name, and the names of others that ours answer.

`find` imports a module of this table when its name is first asked for, so that importing the
package stays light. The module registers the name itself, with `threestudio.register`.
"""

BUILTINS: dict[str, str] = {
    "implicit-volume": "threestudio.models.geometry.implicit_volume",
    "implicit-sdf": "threestudio.models.geometry.implicit_sdf",
    "volume-grid": "threestudio.models.geometry.volume_grid",
    "no-material": "threestudio.models.materials.no_material",
    "diffuse-with-point-light-material": (
        "threestudio.models.materials.diffuse_with_point_light_material"
    ),
    "neural-radiance-material": "threestudio.models.materials.neural_radiance_material",
    "hybrid-rgb-latent-material": "threestudio.models.materials.hybrid_rgb_latent_material",
    "solid-color-background": "threestudio.models.background.solid_color_background",
    "neural-environment-map-background": (
        "threestudio.models.background.neural_environment_map_background"
    ),
    "textured-background": "threestudio.models.background.textured_background",
    "nerf-volume-renderer": "threestudio.models.renderers.nerf_volume_renderer",
    "neus-volume-renderer": "threestudio.models.renderers.neus_volume_renderer",
    "patch-renderer": "threestudio.models.renderers.patch_renderer",
    "stable-diffusion-prompt-processor": (
        "threestudio.models.prompt_processors.stable_diffusion_prompt_processor"
    ),
    "deep-floyd-prompt-processor": (
        "threestudio.models.prompt_processors.deep_floyd_prompt_processor"
    ),
    "dummy-prompt-processor": "threestudio.models.prompt_processors.dummy_prompt_processor",
    "stable-diffusion-guidance": "threestudio.models.guidance.stable_diffusion_guidance",
    "stable-diffusion-vsd-guidance": (
        "threestudio.models.guidance.stable_diffusion_vsd_guidance"
    ),
    "deep-floyd-guidance": "threestudio.models.guidance.deep_floyd_guidance",
    "mesh-exporter": "threestudio.models.exporters.mesh_exporter",
    "dummy-exporter": "threestudio.models.exporters.base",
    "random-camera-datamodule": "threestudio.data.uncond",
    "eff-random-camera-datamodule": "threestudio.data.uncond_eff",
    "dreamfusion-system": "threestudio.systems.dreamfusion",
    "efficient-dreamfusion-system": "threestudio.systems.efficient_dreamfusion",
    "prolificdreamer-system": "threestudio.systems.prolificdreamer",
}

# Names under which upstream's extensions registered what our own extension provides.
ALIASES: dict[str, str] = {
    "mvdream-random-multiview-camera-datamodule": "random-multiview-camera-datamodule",
    "mvdream-multiview-diffusion-guidance": "multiview-diffusion-guidance",
    "mvdream-system": "fourdfy-system",
    "mvdream-neural-environment-map-background": "neural-environment-map-background",
    "4dfy-random-camera-datamodule": "single-view-camera-datamodule",
    "4dfy-random-multiview-camera-datamodule": "random-multiview-camera-datamodule",
    "4dfy-single-multiview-combined-camera-datamodule": (
        "single-multiview-combined-camera-datamodule"
    ),
    "4dfy-implicit-volume": "implicit-volume",
    "4dfy-zeroscope-guidance": "zeroscope-guidance",
    "4dfy-zeroscope-prompt-processor": "zeroscope-prompt-processor",
}
