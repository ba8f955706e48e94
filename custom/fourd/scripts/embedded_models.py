"""Fresh embedded models, as the frozen family describes them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from custom.fourd.diffusion.camera_vector import VIDEO_VECTOR_SIZE

from .make_family import ASSETS, load_family

UNET_CHANNELS = (32, 64, 128)
VIDEO_FACTS = {"num_frames": 16, "class_vector": "embedded-spin", "image_size": 64}
EDIT_FACTS = {"image_size": 64}
IMAGE_FACTS = {"image_size": 64, "ip_adapter_scale": 1.0}
MULTIVIEW_FACTS = {"num_views": 4, "camera_vector": "embedded", "image_size": 64}


def build_text_encoder():
    """A small CLIP text model over the family's vocabulary; draws from torch's global generator."""
    from transformers import CLIPTextConfig, CLIPTextModel

    facts = load_family()
    words = facts["tokenizer"]["words"]
    sizes = {key: value for key, value in facts["text_encoder"].items() if key != "class"}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            max_position_embeddings=facts["tokenizer"]["context_length"],
            projection_dim=sizes["hidden_size"],
            pad_token_id=words.index("<|pad|>"),
            bos_token_id=words.index("<|startoftext|>"),
            eos_token_id=words.index("<|endoftext|>"),
            **sizes,
        )
    )


def build_multiview_unet():
    """The multi-view U-Net: image latents, text, and a camera as class vector."""
    return _build_unet(load_family()["camera_vector"]["size"])


def build_video_unet():
    """The video U-Net, one frame at a time: the multi-view one with the scene time beside the
    camera; `set_cross_view_attention` joins the frames of a clip."""
    return _build_unet(VIDEO_VECTOR_SIZE)


def build_edit_unet():
    """The edit U-Net: the latents of the image to edit beside the noisy ones, and no camera."""
    return _build_unet(None, conditions=1)


def build_image_unet():
    """The U-Net of single images: image latents and text alone."""
    return _build_unet(None)


def build_vision_encoder():
    """The vision encoder of image prompts; draws from torch's global generator.

    Its states before the last layer, 65 tokens, are what the IP-Adapter takes.
    """
    from torch import nn
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=load_family()["latents"]["image_size_px"],
            patch_size=8,
            hidden_size=96,
            intermediate_size=224,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=64,
        )
    )
    # By default positions begin at a twentieth of what the patches are; where things are matters.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.4)
    return model


def _build_unet(class_vector_size: int | None, conditions: int = 0):
    from diffusers import UNet2DConditionModel

    facts = load_family()
    latents = facts["latents"]
    return UNet2DConditionModel(
        sample_size=latents["image_size_px"] // latents["patch_size_px"],
        in_channels=(1 + conditions) * latents["channels"],
        out_channels=latents["channels"],
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=facts["text_encoder"]["hidden_size"],
        attention_head_dim=4,
        norm_num_groups=8,
        # Text also enters as one pooled vector, and both it and the camera scale features: without
        # these the words take thousands of steps to matter at all.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=256,
        class_embed_type=None if class_vector_size is None else "projection",
        projection_class_embeddings_input_dim=class_vector_size,
    )


def build_scheduler():
    """The family's noise schedule: velocity prediction, zero terminal signal."""
    from diffusers import DDIMScheduler

    facts = load_family()["schedule"]
    return DDIMScheduler(**{key: value for key, value in facts.items() if key != "class"})


def write_manifest_entry(name: str, entry: dict, assets: Path = ASSETS) -> None:
    """Record an asset's files with their hashes and sizes, and how it was made."""
    folder = assets / name
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest_path = assets / "MANIFEST.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=assets, check=False
    )
    manifest[name] = {
        "family": load_family()["hash"],
        "files": files,
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **entry,
    }
    manifest_path.write_text(json.dumps(manifest, indent=1) + "\n")
