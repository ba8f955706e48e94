"""Convert MVDream's original checkpoint to a diffusers folder, once.

    python -m custom.fourd.scripts.convert_multiview sd-v2.1-base-4view.pt folder

The guidance reads the original directly; a converted folder loads faster, is smaller (fp16
safetensors) and holds nothing that could be code. With ``--text`` the folder gets the text encoder
and tokenizer of a local Stable Diffusion 2.1 as well, and then serves the prompt processor too.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from threestudio.models.guidance.multiview_facts import MultiviewFacts
from threestudio.utils.pretrained import resolve_checkpoint_file, resolve_pretrained

from ..diffusion.multiview_conversion import MVDREAM_SCHEDULER_CONFIG
from ..diffusion.multiview_prior import build_from_original, read_original_checkpoint


def convert(checkpoint: str, folder: Path, text: str | None = None) -> Path:
    """Write a diffusers folder from an original checkpoint.

    Args:
        checkpoint: file in ldm layout, or ``owner/name/file.pt`` on the hub.
        folder: where to write; must not hold anything.
        text: model whose text encoder and tokenizer are copied; None leaves them out.

    Raises:
        FileExistsError: if ``folder`` holds something.
        ValueError: if the checkpoint is not MVDream's, see `read_original_checkpoint`.
        ModelUnavailableError: if a model cannot be had.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give the name of a new folder.")
    parts = ("text_encoder", "tokenizer")
    source = resolve_pretrained(text, components=parts) if text else None
    unet, autoencoder = build_from_original(
        read_original_checkpoint(resolve_checkpoint_file(checkpoint))
    )
    unet.half().save_pretrained(folder / "unet", safe_serialization=True)
    autoencoder.half().save_pretrained(folder / "vae", safe_serialization=True)
    _write_json(folder / "scheduler" / "scheduler_config.json", MVDREAM_SCHEDULER_CONFIG)
    _write_json(folder / "multiview.json", asdict(MultiviewFacts()))
    for part in parts if source else ():
        shutil.copytree(source / part, folder / part)
    return folder


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="original .pt or .safetensors, or owner/name/file.pt")
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument("--text", help="model whose text encoder and tokenizer are copied")
    arguments = parser.parse_args(argv)
    print(convert(arguments.checkpoint, arguments.folder, arguments.text))


if __name__ == "__main__":
    main()
