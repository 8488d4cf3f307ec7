"""The header of a GGUF file: its settings, and the sizes and formats of its tensors.

A file may come from anyone, and the readers of other packages trust its numbers: they take memory
for an array of 2^60 elements, or read it for ever. Every number is checked here, against the size
of the file and the limits below, before they open it.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from batchbench.errors import UsageError, shown
from batchbench.files import MIB, reason_of

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_PLAIN = ("F64", "F32", "F16", "BF16")

_MOST_ENTRIES = 2**16
"""Maximum number of settings, and of tensors."""

_MOST_ELEMENTS = 2**21
"""Maximum number of elements of all arrays; the largest vocabularies have 0.3 million tokens, each
with a score, a type and about two merges."""

_MOST_BYTES, _MOST_TEXT = 64 * MIB, MIB
"""Maximum length of the header, and of a text in it, such as a chat template, in bytes."""


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A GGUF file whose numbers are checked.

    Its settings are scalars and texts by name, and the lengths of arrays. The formats of its
    tensors are sorted by their number of weights; ``largest`` is the number in the largest tensor.
    """

    path: Path
    settings: Mapping[str, Any]
    tensors: Collection[str]
    formats: Sequence[str]
    largest: int

    @property
    def quantization(self) -> str | None:
        """The formats that are dequantised when the file is loaded; None if there are none."""
        return ", ".join(name for name in self.formats if name not in _PLAIN) or None

    @property
    def ignored(self) -> str | None:
        """A part of the model that transformers does not read."""
        scaling = self.settings.get(f"{self.settings['general.architecture']}.rope.scaling.type")
        if "rope_freqs.weight" in self.tensors or scaling not in (None, "none"):
            return "its scaled rotary positions"
        return None

    def config(self) -> dict[str, Any]:
        """Return the settings by their names in a ``config.json``."""
        kind = self.settings["general.architecture"]
        found = {"model_type": kind}
        for ours, theirs in _CONFIG.items():
            value = self.settings.get(f"{kind}.{theirs}")
            if value is None and ours == "vocab_size":
                value = self.settings.get("tokenizer.ggml.tokens")
            if value is None:
                raise UsageError(f"lacks {kind}.{theirs}")
            found[ours] = value
        ends = (self.settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        return {**found, "eos_token_id": sorted({end for end in ends if end is not None})}


_CONFIG = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
}


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file; errors do not name the file."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise UsageError(f"needs {' and '.join(missing)}; type pip install 'batchbench-llm[gguf]'")
    try:
        with path.open("rb") as opened:
            return _Reader(opened, path).file()
    except OSError as error:
        raise UsageError(f"cannot be read: {reason_of(error)}") from error


@contextmanager
def alone(file: Path) -> Iterator[Path]:
    """Yield a folder with nothing but a link to this file.

    In a folder that also has a tokenizer.json or an adapter, transformers would read these.
    """
    with tempfile.TemporaryDirectory(prefix="batchbench-gguf-") as name:
        folder = Path(name)
        try:
            (folder / file.name).symlink_to(file.resolve())
        except OSError:  # Windows allows links in its developer mode only
            folder = file.parent
        yield folder


class _Reader:
    """Reads values one after the other; refuses those that reach beyond the end of the file."""

    def __init__(self, opened: BinaryIO, path: Path) -> None:
        self._opened, self._path, self._size = opened, path, path.stat().st_size
        self._read = self._elements = 0

    def file(self) -> GgufFile:
        if self._size < 24 or self._take(4) != b"GGUF":
            raise UsageError("is a file but not GGUF; give a checkpoint's folder or a *.gguf file")
        if (version := self._number("I")) not in (2, 3):
            raise UsageError(f"has GGUF version {version}; versions 2 and 3 are read")
        tensors, count = self._number("Q"), self._number("Q")
        if max(tensors, count) > _MOST_ENTRIES:
            raise _damaged(f"{tensors:,} tensors and {count:,} settings")
        settings: dict[str, Any] = {}
        for _ in range(count):
            name = self._text()
            if name in settings:
                raise _damaged(f"{shown(name)} twice")
            settings[name] = self._value(self._number("I"))
        if not isinstance(settings.get("general.architecture"), str):
            raise _damaged("no general.architecture")
        alignment = settings.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _damaged(f"general.alignment = {shown(alignment)}")
        return self._with_tensors(settings, tensors, alignment)

    def _with_tensors(self, settings: Mapping[str, Any], count: int, alignment: int) -> GgufFile:
        weights, names, end, largest = Counter[str](), set[str](), 0, 0
        for _ in range(count):
            name, dimensions = self._text(), self._number("I")
            if name in names or not 1 <= dimensions <= 4:
                raise _damaged(f"the tensor {shown(name)} twice or of {dimensions} dimensions")
            names.add(name)
            shape = [self._number("Q") for _ in range(dimensions)]
            kind, offset = self._number("I"), self._number("Q")
            if kind not in _formats():
                raise UsageError(f"has the tensor {shown(name)} in an unknown format, {kind}")
            kind_name, block, block_bytes = _formats()[kind]
            elements = math.prod(shape)
            if not elements or shape[0] % block:
                raise _damaged(f"the tensor {shown(name)} of shape {shape} in {kind_name}")
            end = max(end, offset + elements // block * block_bytes)
            weights[kind_name] += elements
            largest = max(largest, elements)
        begin = -(-self._read // alignment) * alignment
        if begin + end > self._size:
            sizes = f"its tensors need {begin + end:,} bytes and it has {self._size:,}"
            raise UsageError(f"is cut off: {sizes}; fetch it again")
        formats = [name for name, _ in weights.most_common()]
        return GgufFile(self._path, settings, names, formats, largest)

    def _take(self, length: int) -> bytes:
        self._read += length
        if self._read > min(self._size, _MOST_BYTES):
            cut = self._read > self._size
            raise UsageError("is cut off; fetch it again") if cut else _damaged("over 64 MiB")
        return self._opened.read(length)

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _text(self) -> str:
        if (length := self._number("Q")) > _MOST_TEXT:
            raise _damaged(f"a text of {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise _damaged("a text that is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        """Read one value; return the length of an array."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        element, length = (self._number("I"), self._number("Q")) if kind == _ARRAY else (None, 0)
        self._elements += length
        if self._elements > _MOST_ELEMENTS:
            raise _damaged(f"arrays of {self._elements:,} elements")
        if element == _STRING:
            for _ in range(length):
                self._text()
        elif element in _SCALARS:
            self._take(length * struct.calcsize(f"<{_SCALARS[element]}"))
        else:
            raise _damaged(f"a value of type {kind if element is None else element}")
        return length


@cache
def _formats() -> Mapping[int, tuple[str, int, int]]:
    """Return name, weights and bytes of a block of every format of tensors, by its number."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _damaged(what: str) -> UsageError:
    return UsageError(f"is damaged: its header has {what}; fetch it again")
