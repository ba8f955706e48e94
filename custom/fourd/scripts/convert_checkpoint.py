"""Convert an original checkpoint to a diffusers folder, once.

    python -m custom.fourd.scripts.convert_checkpoint --kind mvdream sd-v2.1-base-4view.pt folder

Kinds: ``stable-diffusion`` (1.x and 2.x), ``mvdream``, ``modelscope-video`` (ModelScope's folder of
three files, or Zeroscope's U-Net in that layout), ``videocrafter`` (VideoCrafter2's ``model.ckpt``)
and ``diffusers`` (a diffusers folder of pickles, as Zeroscope's). Every tensor must have its place
and every place its tensor. Pickles are read as data; what asks for code is refused. A tokenizer is
in none of these checkpoints: ``--text`` copies that of a model on this disk or on the hub. The
folder appears under its name when all of it is written.
"""

import argparse
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from threestudio.models.guidance.multiview_facts import MultiviewFacts
from threestudio.utils.pretrained import resolve_checkpoint_file, resolve_pretrained

from ..diffusion.checkpoint_conversion import (
    KINDS,
    ConvertedPart,
    convert_checkpoint,
    read_original,
    read_pickled_folder,
)
from ..diffusion.ldm_conversion import LDM_SCHEDULER_CONFIG

FOLDER_KIND = "diffusers"
PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}
PREDICTION_TYPES = ("epsilon", "v_prediction")
_PIPELINES = {
    "stable-diffusion": "StableDiffusionPipeline",
    "mvdream": "StableDiffusionPipeline",
    "modelscope-video": "TextToVideoSDPipeline",
    "videocrafter": "TextToVideoSDPipeline",
}


def convert(
    kind: str,
    source: str | Path,
    folder: Path,
    text: str | None = None,
    precision: str = "fp16",
    prediction_type: str = "epsilon",
) -> Path:
    """Write a diffusers folder from an original checkpoint.

    Args:
        kind: one of `KINDS`, or "diffusers" for a folder of pickles.
        source: file, folder, or ``owner/name/file.ext`` on the hub.
        folder: where to write; must not hold anything.
        text: model whose tokenizer is copied, and whose text encoder where the checkpoint has none;
            None leaves them out.
        precision: of the written weights, "fp16" or "fp32".
        prediction_type: what the U-Net predicts, which no checkpoint says; "v_prediction" for SD
            2.1 at 768 pixels.

    Raises:
        FileExistsError: if ``folder`` holds something.
        ValueError: if the checkpoint is not of this kind, or holds code.
        ModelUnavailableError: if a model cannot be had.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; give the name of a new folder.")
    path = _found(source)
    if kind == FOLDER_KIND:
        parts = read_pickled_folder(path)
        others = _other_files(path, parts)
    else:
        parts, others = convert_checkpoint(kind, read_original(kind, path)), []
    copied = _parts_to_copy(text, parts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        for part in parts:
            _write_part(draft / part.name, part, PRECISIONS[precision])
        for file in others:
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / file, draft / file)
        for part_folder in copied:
            shutil.copytree(part_folder, draft / part_folder.name)
        if kind != FOLDER_KIND:
            _write_facts(draft, kind, prediction_type)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _found(source: str | Path) -> Path:
    path = Path(source).expanduser()
    return path if path.is_dir() else resolve_checkpoint_file(str(source))


def _parts_to_copy(text: str | None, parts: Sequence[ConvertedPart]) -> list[Path]:
    """Folders of ``text``: its tokenizer, and its text encoder where none was converted."""
    if text is None:
        return []
    names = ["tokenizer"]
    if not any(part.name == "text_encoder" for part in parts):
        names.append("text_encoder")
    root = resolve_pretrained(text, components=names)
    return [root / name for name in names]


def _other_files(folder: Path, parts: Sequence[ConvertedPart]) -> list[Path]:
    """What a folder of pickles holds besides: configurations, words, weights that are safe."""
    written = {Path(part.name) / "config.json" for part in parts}
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    wanted = (".json", ".txt", ".safetensors")
    return [file for file in files if file.suffix in wanted and file not in written]


def _write_part(folder: Path, part: ConvertedPart, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    is_text = part.class_name == "CLIPTextModel"
    # The published names of text encoders have this prefix, which every version of transformers
    # reads.
    prefix = "text_model." if is_text else ""
    save_file(
        # A copy of each, since parts of one tensor may not share memory in the file.
        {f"{prefix}{name}": _copied(value, dtype) for name, value in part.state.items()},
        folder / f"{'model' if is_text else 'diffusion_pytorch_model'}.safetensors",
        metadata={"format": "pt"},
    )
    kind = {"architectures": [part.class_name], "model_type": "clip_text_model"}
    own = kind if is_text else {"_class_name": part.class_name}
    _write_json(folder / "config.json", {**part.config, **own})


def _copied(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    wanted = dtype if value.is_floating_point() else value.dtype
    return value.to(wanted, copy=True).contiguous()


def _write_facts(folder: Path, kind: str, prediction_type: str) -> None:
    scheduler = {**LDM_SCHEDULER_CONFIG, "prediction_type": prediction_type}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_json(folder / "model_index.json", {"_class_name": _PIPELINES[kind]})
    if kind == "mvdream":
        _write_json(folder / "multiview.json", asdict(MultiviewFacts()))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def missing_components(folder: Path) -> list[str]:
    """List what a prompt processor or a guidance may want and the folder does not have."""
    wanted = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    return [name for name in wanted if not (folder / name).is_dir()]


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", required=True, choices=[*KINDS, FOLDER_KIND])
    parser.add_argument("source", help="file, folder, or owner/name/file.ext on the hub")
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument("--text", help="model whose tokenizer (and text encoder) is copied")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        default="epsilon",
        help="v_prediction for SD 2.1 at 768 pixels",
    )
    arguments = parser.parse_args(argv)
    folder = convert(
        arguments.kind,
        arguments.source,
        arguments.folder,
        arguments.text,
        arguments.precision,
        arguments.prediction_type,
    )
    missing = missing_components(folder)
    if missing:
        print(f"without {', '.join(missing)}: the source holds none; --text copies a tokenizer")
    print(folder)


if __name__ == "__main__":
    main()
