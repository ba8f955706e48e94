"""Upstream's registered modules that this runtime does not provide, and what to use instead.

Each entry completes the sentence of `registry.NotProvidedError`: why the module is not here, after
the semicolon what serves in its place. An extension may register any of these names.
"""

_RASTERISES = "it rasterises meshes with nvdiffrast, which needs a CUDA GPU and a compiled package"
_ZERO123 = "it needs the Zero123 model, whose code and weights upstream vendors"
_FROM_IMAGE = (
    "use dreamfusion-system or fourdfy-system with a prompt, since no prior here reads an image."
)
_CONTROLNET = "it needs ControlNet weights and an edge or normal detector (controlnet_aux)"
_PHOTOS = "it reads posed photographs from disk, which no system of this runtime trains on"
_CAMERAS = "use random-camera-datamodule, whose cameras need no files."

REFUSED: dict[str, str] = {
    # Systems
    "magic3d-system": (
        f"{_RASTERISES} in its refinement; use dreamfusion-system, which is its coarse stage."
    ),
    "sjc-system": (
        "it trains a voxel grid of latents with losses of its own; use dreamfusion-system with "
        "system.guidance.use_sjc=true, which is its gradient."
    ),
    "latentnerf-system": (
        "it trains in the latents of an autoencoder and then refines in colour with a sketch or "
        "mesh guide; use dreamfusion-system, which trains in colour from the start."
    ),
    "fantasia3d-system": f"{_RASTERISES}; use dreamfusion-system with implicit-volume.",
    "textmesh-system": (
        "it asks a DeepFloyd model about normals as well as colours, by a recipe of its own; use "
        "dreamfusion-system with implicit-sdf and neus-volume-renderer."
    ),
    "zero123-system": f"{_ZERO123}; {_FROM_IMAGE}",
    "zero123-simple-system": f"{_ZERO123}; {_FROM_IMAGE}",
    "magic123-system": f"{_ZERO123}; {_FROM_IMAGE}",
    "image-condition-dreamfusion-system": (
        f"it fits one photograph with its mask, depth and normals; {_FROM_IMAGE}"
    ),
    "instructnerf2nerf-system": (
        f"{_PHOTOS}, and edits them with InstructPix2Pix; use dreamfusion-system with a prompt of "
        "the edited scene."
    ),
    "control4d-multiview-system": (
        f"it trains a GAN behind its renderer, and {_CONTROLNET.removeprefix('it ')}; use "
        "fourdfy-system for moving scenes."
    ),
    "sdi-system": (
        "it needs stable-diffusion-sdi-guidance, which inverts the sampler of a model in every "
        "step; use dreamfusion-system with stable-diffusion-guidance."
    ),
    # Data
    "single-image-datamodule": (
        "it reads one image with its mask and depth, for systems that start from an image; "
        f"{_FROM_IMAGE}"
    ),
    "multiview-camera-datamodule": f"{_PHOTOS}; {_CAMERAS}",
    "co3d-datamodule": f"{_PHOTOS} (in the format of CO3D); {_CAMERAS}",
    # Geometry
    "tetrahedra-sdf-grid": (
        f"{_RASTERISES}, which alone can train it; use implicit-sdf with neus-volume-renderer, and "
        "mesh-exporter for the mesh."
    ),
    "custom-mesh": f"{_RASTERISES}, which alone can show it; use implicit-volume.",
    # Material
    "pbr-material": (
        "it looks light up with nvdiffrast and envlight, which need a CUDA GPU and compiled "
        "packages; use diffuse-with-point-light-material."
    ),
    "sd-latent-adapter-material": (
        "it turns latents into colours for systems that train in latents; use no-material, which "
        "gives colours directly."
    ),
    # Renderers
    "nvdiff-rasterizer": f"{_RASTERISES}; use nerf-volume-renderer or neus-volume-renderer.",
    "gan-volume-renderer": (
        "it needs upstream's vendored generator and discriminator, which train with it; use "
        "nerf-volume-renderer."
    ),
    # Guidance
    "stable-diffusion-unified-guidance": (
        "it joins several fine-tuning formats behind one class; use stable-diffusion-guidance for "
        "score distillation or stable-diffusion-vsd-guidance for its variational form."
    ),
    "stable-diffusion-sdi-guidance": (
        "it inverts the sampler of a model in every step, with vendored code; use "
        "stable-diffusion-guidance."
    ),
    "stable-diffusion-instructpix2pix-guidance": (
        "it needs an InstructPix2Pix model and a system that edits images; use "
        "stable-diffusion-guidance with a prompt of the edited scene."
    ),
    "stable-diffusion-controlnet-guidance": f"{_CONTROLNET}; use stable-diffusion-guidance.",
    "zero123-guidance": f"{_ZERO123}; {_FROM_IMAGE}",
    "stable-zero123-guidance": f"{_ZERO123}; {_FROM_IMAGE}",
    "zero123-unified-guidance": f"{_ZERO123}; {_FROM_IMAGE}",
    # Other
    "perceptual-loss": (
        "it needs torchvision's VGG16 and downloaded LPIPS weights; use threestudio.utils.loss or "
        "a squared error."
    ),
}
