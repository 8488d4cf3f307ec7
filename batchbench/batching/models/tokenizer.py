"""A checkpoint's tokenizer: text to token ids and back, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from batchbench.errors import UsageError


class Tokenizer(Protocol):
    """Text to token ids and back.

    Encoding adds no special tokens. Decoding keeps those that the ids hold: without ``<|im_end|>``
    and ``<|im_start|>`` the role between two turns, ``assistant``, would stand in the text as if
    the model had written it to the user.
    """

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


class _Fast:
    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Loaded

        self._tokenizer = Loaded.from_file(str(file))

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class _Transformers:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def find_tokenizer(folder: Path | None) -> Tokenizer | None:
    """The tokenizer saved in a checkpoint's folder; None where there is none.

    Raises:
        UsageError: there is one, and it is spoiled.
    """
    if folder is None:
        return None
    try:
        if (folder / "tokenizer.json").exists():
            return _Fast(folder / "tokenizer.json")
        if (folder / "vocab.json").exists() or (folder / "tokenizer_config.json").exists():
            return _Transformers(folder)
    except Exception as error:  # the libraries raise plain Exception for a spoiled file
        raise UsageError(
            f"{folder}: its tokenizer (tokenizer.json or vocab.json) cannot be read: {error}; "
            "fetch it again"
        ) from error
    return None
