"""Words that a small text encoder knows, so that a prompt beyond them is refused, not garbled.

Encoders of published models split unknown words into pieces and know them all; only a word-level
tokenizer, such as that of the embedded checkpoints, has a vocabulary in this sense.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threestudio.suggest import nearest


@dataclass(frozen=True)
class WordVocabulary:
    """The vocabulary of a word-level tokenizer."""

    words: tuple[str, ...]
    """All words in alphabetical order, special tokens and punctuation left out."""
    tokenizer: Any
    """The `tokenizers.Tokenizer`."""
    unknown_token: str
    """What the tokenizer answers for a word that it does not know."""

    def unknown_words(self, prompt: str) -> list[str]:
        """List the words of a prompt that are not in the vocabulary, in order, each once."""
        encoding = self.tokenizer.encode(prompt, add_special_tokens=False)
        unknown = [
            prompt[start:end]
            for token, (start, end) in zip(encoding.tokens, encoding.offsets)
            if token == self.unknown_token
        ]
        return list(dict.fromkeys(unknown))


def read_vocabulary(model_folder: Path) -> WordVocabulary | None:
    """Read the vocabulary of a diffusers folder; None if its tokenizer splits unknown words."""
    path = Path(model_folder) / "tokenizer" / "tokenizer.json"
    if not path.is_file():
        return None
    model = json.loads(path.read_text(encoding="utf-8")).get("model", {})
    if model.get("type") != "WordLevel":
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    words = (word for word in model["vocab"] if word not in special and word != model["unk_token"])
    readable = sorted(word for word in words if any(letter.isalnum() for letter in word))
    return WordVocabulary(tuple(readable), tokenizer, model["unk_token"])


def check_words(
    model: str, vocabulary: WordVocabulary | None, prompts: Iterable[str], kind: str = "prompt"
) -> None:
    """Refuse prompts with words that the text encoder of ``model`` does not know.

    Args:
        model: name of the model, for the message.
        vocabulary: its words; None knows every word.
        prompts: texts to check.
        kind: name of the config key that the texts come from, for the message.

    Raises:
        ValueError: listing the unknown words, near matches and all known words.
    """
    if vocabulary is None:
        return
    for prompt in prompts:
        unknown = vocabulary.unknown_words(prompt)
        if not unknown:
            continue
        near = []
        for word in unknown:
            near += nearest(word, vocabulary.words, n=2, cutoff=0.6)
        hint = f" Did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
        raise ValueError(
            f"The {kind} {prompt!r} holds words that the text encoder of '{model}' does not know: "
            f"{', '.join(unknown)}.{hint} It knows only these words: {' '.join(vocabulary.words)}. "
            "For any other words choose a full-size model (profile=low_vram or profile=paper)."
        )
