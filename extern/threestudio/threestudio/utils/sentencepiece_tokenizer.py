"""A tokenizer from a sentencepiece model file, without the sentencepiece package.

Published T5 models (DeepFloyd IF among them) hold ``spiece.model`` and nothing else. The file is a
protocol buffer; the few fields that segmentation needs are read here, and the `tokenizers` library
does the rest.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_UNKNOWN, _CONTROL = 2, 3  # kinds of pieces, by the format's own numbers
_UNIGRAM = 1
_SPACE = "\u2581"
# What reading other bytes as such a file can end in.
_DAMAGE = (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, struct.error)


class SentencePieces(NamedTuple):
    """What a sentencepiece model file says."""

    pieces: list[tuple[str, float]]
    """text and log probability, in the order of their ids"""
    kinds: list[int]
    model_type: int
    charsmap: bytes
    """precompiled normalisation of characters; empty changes none"""


def read_sentencepieces(path: Path) -> SentencePieces:
    """Read a sentencepiece model file.

    Raises:
        ValueError: if it is no such file, or cut short.
    """
    pieces: list[tuple[str, float]] = []
    kinds: list[int] = []
    model_type, charsmap = _UNIGRAM, b""
    try:
        for field, content in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(content))
                pieces.append((piece[1].decode("utf-8"), _float(piece.get(2, bytes(4)))))
                kinds.append(piece.get(3, 1))
            elif field == 2:
                model_type = dict(_fields(content)).get(3, _UNIGRAM)
            elif field == 3:
                charsmap = dict(_fields(content)).get(2, b"")
    except _DAMAGE as error:
        raise ValueError(f"{path} is no sentencepiece model; fetch the model again.") from error
    if not pieces:
        raise ValueError(f"{path} is no sentencepiece model; fetch the model again.")
    return SentencePieces(pieces, kinds, model_type, charsmap)


def t5_tokenizer(path: Path, max_length: int = 512) -> Any:
    """Return a `PreTrainedTokenizerFast` that segments as T5 does and ends texts with ``</s>``.

    Args:
        path: the ``spiece.model`` of a T5.
        max_length: tokens that the tokenizer states as its longest text.

    Raises:
        ValueError: if the file cannot be read, or is no unigram model.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    model = read_sentencepieces(path)
    if model.model_type != _UNIGRAM or _UNKNOWN not in model.kinds:
        raise ValueError(
            f"{path} is a sentencepiece model of type {model.model_type}; expected a unigram model "
            "with an unknown piece, that of a T5."
        )
    unknown = model.kinds.index(_UNKNOWN)
    tokenizer = Tokenizer(models.Unigram(model.pieces, unk_id=unknown, byte_fallback=False))
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    steps += [normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
    ids = {text: index for index, (text, _) in enumerate(model.pieces)}
    special = [text for (text, _), kind in zip(model.pieces, model.kinds) if kind == _CONTROL]
    tokenizer.add_special_tokens([*special, model.pieces[unknown][0]])
    end = "</s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, ids[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        eos_token=end,
        unk_token=model.pieces[unknown][0],
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, content) of each field: an int, or the bytes of everything else."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise KeyError(f"wire type {kind}")
        if place + size > len(data):
            raise IndexError("the file ends inside a field")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _float(data: bytes) -> float:
    return struct.unpack("<f", data)[0]
