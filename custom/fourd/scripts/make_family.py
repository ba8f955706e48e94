"""Freeze the family of embedded checkpoints: tokenizer, latents, schedule, camera vector.

Everything that two embedded models must agree on stands in `assets/FAMILY.json`, written before
the first training. The vocabulary already holds the words of methods whose models come later, so
that no later word moves an earlier token.

    python -m custom.fourd.scripts.make_family
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from custom.fourd.diffusion.camera_vector import (
    AZIMUTH_HARMONICS,
    CAMERA_VECTOR_SIZE,
    ELEVATION_HARMONICS,
)
from custom.fourd.world import vocabulary as world

ASSETS = Path(__file__).parents[1] / "assets"
CONTEXT_LENGTH = 77
PAD, START, END, UNKNOWN = "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
PLACEHOLDERS = ("<time>", "<view>", "<control>", *(f"<reserved_{i}>" for i in range(29)))

WORDS = {
    "grammar": "a an the it its this that these two one three both with without and or not of to "
    "on in at by from for top next beside above below under over behind front left right between "
    "inside around near far made",
    "appearance": "tiny huge big little bigger smaller larger taller shorter white black brown "
    "grey gray gold golden silver dark light bright darker lighter brighter colour color colored "
    "coloured stone glass clay plastic marble brick paper ice leather fabric shiny matte glossy "
    "rough smooth dotted spotted checkered plain stripes dots spots checks pattern texture "
    "textured transparent object objects thing shape box ball ring donut prism star heart",
    "motion": "swinging rolling floating pulsing falling rising wobbling rotating turning moving "
    "jumping shaking drifting still resting slowly quickly fast slow up down forward backward "
    "left right back motion",
    "view": "front side back overhead rear view views camera angle seen from facing",
    "template": "photo photograph picture image rendering rendition render depiction drawing "
    "illustration model scene video animation frame clip cropped close clean dirty cool nice "
    "weird good bad my toy time high low quality resolution 3d 4d background",
    "instruction": "make turn change paint give add remove replace let swap put have keep color "
    "colour into like look looks as style stylized sketch pencil watercolor watercolour oil "
    "painting van gogh night day snow winter autumn sunset neon pastel rainbow poster pixel "
    "cartoon comic negative inverted sepia monochrome warm cold random palette out be become "
    "should would please more less",
    "negative": "ugly blurry pixelated noisy distorted deformed duplicate extra empty nothing",
    "digits": "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
    "punctuation": ", . : ; ! ? ' \" - ( ) /",
}


def vocabulary() -> list[str]:
    """Every token in its frozen order: specials, placeholders, then words without repetition."""
    listed = [
        *world.SHAPES,
        *world.SHAPE_SYNONYMS,
        *world.COLOURS,
        *world.SIZES,
        *world.MATERIALS,
        *world.MATERIAL_SYNONYMS,
        *world.MOTIONS,
        *" ".join((*world.RELATIONS, *world.RELATION_SYNONYMS, *world.VIEW_SUFFIXES)).split(),
        *" ".join(WORDS.values()).split(),
    ]
    return list(dict.fromkeys((PAD, START, END, UNKNOWN, *PLACEHOLDERS, *listed)))


def make_tokenizer():
    """A word-level tokenizer that pads to the context length, in the transformers interface."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, ids[START]), (END, ids[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT_LENGTH,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(PLACEHOLDERS),
    )


def family() -> dict:
    """The frozen facts, as they stand in FAMILY.json (without their own hash)."""
    words = vocabulary()
    return {
        "name": "threestudio-4d-embedded",
        "version": 1,
        "tokenizer": {
            "kind": "word-level, lower case",
            "context_length": CONTEXT_LENGTH,
            "size": len(words),
            "words": words,
        },
        "text_encoder": {
            "class": "CLIPTextModel",
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "latents": {
            "class": "PatchAutoencoder",
            "image_size_px": 64,
            "patch_size_px": 4,
            "channels": 16,
            "scaling_factor": 1.0,
        },
        "schedule": {
            "class": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "clip_sample": False,
            "set_alpha_to_one": True,
        },
        "camera_vector": {
            "kind": "embedded",
            "size": CAMERA_VECTOR_SIZE["embedded"],
            "azimuth_harmonics": list(AZIMUTH_HARMONICS),
            "elevation_harmonics": list(ELEVATION_HARMONICS),
            "num_views": 4,
        },
    }


def family_hash(facts: dict) -> str:
    """SHA-256 of the facts in a canonical writing; every asset's manifest entry carries it."""
    facts = {key: value for key, value in facts.items() if key != "hash"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_family() -> dict:
    """FAMILY.json, checked against its own hash.

    Raises:
        ValueError: the file was edited after it was frozen.
    """
    facts = json.loads((ASSETS / "FAMILY.json").read_text())
    if facts["hash"] != family_hash(facts):
        raise ValueError(
            "custom/fourd/assets/FAMILY.json does not match its own hash: the family is frozen, "
            "and an edit would silently break every embedded checkpoint. Restore the file."
        )
    return facts


def main() -> int:
    path = ASSETS / "FAMILY.json"
    facts = family()
    facts["hash"] = family_hash(facts)
    if path.exists() and json.loads(path.read_text()) != facts:
        print(f"{path.name} is frozen and differs from what this script would write; not touched.")
        return 1
    ASSETS.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{path.name}: {facts['tokenizer']['size']} tokens, hash {facts['hash'][:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
