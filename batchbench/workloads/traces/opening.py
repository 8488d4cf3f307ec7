"""Trace files as streams of UTF-8 text: decompression, decoding, and files that are not traces."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from batchbench.errors import UsageError
from batchbench.files import open_binary, reason_of
from batchbench.workloads.spec import TRACE_FORMATS
from batchbench.workloads.traces.rows import shown

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HEAD_BYTES = 2**16
"""Number of bytes from which the kind of a file is found."""

_MOST_MEMORY = 2**27
"""Maximum memory of a decompressor; xz -9 needs 65 MiB, zstd --long 128 MiB."""

_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def open_trace(file: Path, where: str) -> Iterator[tuple[BinaryIO, bytes, str]]:
    """Open a trace for reading UTF-8 text.

    Yields:
        The stream, its first bytes (64 KiB, or all there are), and the kind of archive, such as
        ``a gzip archive``, or "".

    Raises:
        UsageError: it cannot be opened or read, also in the body of the with statement.
    """
    archive = ""
    try:
        with open_binary(file, where) as raw:
            head, stream = _looked_at(_pieces(raw))
            for magic, kind, unpacked in _ARCHIVES:
                if head.startswith(magic):
                    archive = kind
                    head, stream = _looked_at(unpacked(stream))
                    break
            head, stream = _decoded(head, stream)
            yield stream, head, archive
    except (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        raise UsageError(f"{where}: is {archive} that cannot be read: {error}") from error
    except UnicodeError as error:
        raise UsageError(
            f"{where}: is not the kind of text that its first bytes indicate: {error}"
        ) from error
    except OSError as error:
        what = f"is {archive} that " if archive else ""
        raise UsageError(f"{where}: {what}cannot be read: {reason_of(error)}") from error


class _Stream(io.RawIOBase):
    """A stream of the bytes that an iterator yields in pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if (piece := next(self._pieces, None)) is None:
                return 0
            self._ready = memoryview(piece)
        data = self._ready[: len(buffer)]
        self._ready = self._ready[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _pieces(source: BinaryIO | gzip.GzipFile | bz2.BZ2File) -> Iterator[bytes]:
    return iter(lambda: source.read(HEAD_BYTES), b"")


def _looked_at(pieces: Iterator[bytes]) -> tuple[bytes, BinaryIO]:
    """Return the beginning of a stream, and a stream of the whole."""
    head = b""
    while len(head) < HEAD_BYTES and (piece := next(pieces, None)) is not None:
        head += piece
    stream = io.BufferedReader(_Stream(chain([head], pieces)), HEAD_BYTES)
    return head[:HEAD_BYTES], cast(BinaryIO, stream)


def _decoded(head: bytes, stream: BinaryIO) -> tuple[bytes, BinaryIO]:
    """Return the beginning of a text and a stream of it, as UTF-8 whose lines end in ``\\n``."""
    encoding = next((name for mark, name in _ENCODINGS if head.startswith(mark)), None)
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        head, stream = _looked_at(_pieces(stream))
    elif encoding is not None:
        decoder = codecs.getincrementaldecoder(encoding)()
        pieces = chain(_pieces(stream), [b""])  # the last call checks that the text is whole
        head, stream = _looked_at(decoder.decode(piece, not piece).encode() for piece in pieces)
    if b"\r" in head and b"\n" not in head:  # as old Macs write it
        return _looked_at(piece.replace(b"\r", b"\n") for piece in _pieces(stream))
    return head, stream


def _unpacked(
    source: BinaryIO, new: Callable[[], lzma.LZMADecompressor | zstd.ZstdDecompressor]
) -> Iterator[bytes]:
    """Yield the content of an xz or zstd archive, in bounded memory."""
    decoder = new()
    while True:
        piece = b""
        if decoder.eof:  # streams may follow one another, with padding between them
            piece = decoder.unused_data.lstrip(b"\0")
            while not piece:
                if not (piece := source.read(HEAD_BYTES)):
                    return
                piece = piece.lstrip(b"\0")
            decoder = new()
        elif decoder.needs_input and not (piece := source.read(HEAD_BYTES)):
            raise EOFError("it ends early")
        if data := decoder.decompress(piece, HEAD_BYTES):
            yield data


def _of_xz(source: BinaryIO) -> Iterator[bytes]:
    return _unpacked(source, partial(lzma.LZMADecompressor, memlimit=_MOST_MEMORY))


def _of_zstd(source: BinaryIO) -> Iterator[bytes]:
    limit = {int(zstd.DecompressionParameter.window_log_max): _MOST_MEMORY.bit_length() - 1}
    return _unpacked(source, partial(zstd.ZstdDecompressor, options=limit))


_ARCHIVES: tuple[tuple[bytes, str, Callable[[BinaryIO], Iterator[bytes]]], ...] = (
    (b"\x1f\x8b", "a gzip archive", lambda source: _pieces(gzip.GzipFile(fileobj=source))),
    (b"BZh", "a bzip2 archive", lambda source: _pieces(bz2.BZ2File(source))),
    (b"\xfd7zXZ\x00", "an xz archive", _of_xz),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _of_zstd),
    (b"\x50\x2a\x4d\x18", "a zstd archive", _of_zstd),  # as pzstd writes
)


# Files that are not traces

_UNPACK = "unpack it and give the file inside"
_EXPORT = "save it as CSV, such as with pandas' to_csv"

_KINDS = (
    (rb"PK\x03\x04.*(?:\[Content_Types\]\.xml|xl/)", "a spreadsheet", "save it as CSV"),
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive", _UNPACK),
    (
        rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "a spreadsheet or another Office file",
        "save it as CSV",
    ),
    (rb"PAR1", "a parquet file", _EXPORT),
    (rb"(?:ARROW1|FEA1)", "an Arrow file", _EXPORT),
    (rb"ORC", "an ORC file", _EXPORT),
    (rb"Obj\x01", "an Avro file", _EXPORT),
    (rb"\x89HDF\r\n", "an HDF5 file", _EXPORT),
    (rb"\x93NUMPY", "a NumPy array", _EXPORT),
    (rb"SQLite format 3\x00", "an SQLite database", "save its table as CSV"),
    (rb"\x80[\x02-\x05]", "a Python pickle", "save it as CSV or JSON"),
    (rb"%PDF-", "a PDF", "give the data themselves"),
    (rb"(?:\x89PNG|\xff\xd8\xff|GIF8)", "a picture", "give the data themselves"),
    (rb"version https://git-lfs\.github\.com/", "a Git LFS pointer", "fetch it with git lfs pull"),
    (rb"(?i)\s*<(?:!doctype html|html|head)", "an HTML page", "download the raw file"),
    (rb"\s*<(?:\?xml|[A-Za-z])", "XML", "save it as CSV or JSON"),
    (rb"GGUF", "a GGUF model", "give it with --model"),
    (rb"\x7fELF|MZ|#!", "a program", "give a file of data"),
    (rb"(?s:.{257})ustar", "a tar archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (rb"\x04\x22\x4d\x18", "an lz4 archive", _UNPACK),
    (rb"\x1f\x9d", "a compress (.Z) archive", _UNPACK),
    (rb"\x1f\x8b", "a gzip archive", _UNPACK),  # inside another archive
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (rb"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (rb"BZh[1-9]1AY&SY", "a bzip2 archive", _UNPACK),
)

_TEXT = bytes({7, 8, 9, 10, 12, 13, 27, *range(0x20, 0x100)})


def other_kind(head: bytes) -> str | None:
    """Return the kind of a file that cannot be a trace, and some advice; else None."""
    if not head.strip():
        return f"{'blank text' if head else 'an empty file'}; give a file with requests"
    for pattern, kind, advice in _KINDS:
        if re.match(pattern, head, re.DOTALL):
            return f"{kind}; {advice}"
    start = head[:200]
    if 0 in (start[::2].count(0), start[1::2].count(0)) and start.count(0) * 3 > len(start):
        return "UTF-16 text without a byte-order mark; save it as UTF-8"
    controls = len(head.translate(None, _TEXT))
    if controls * 20 > len(head):
        return "binary data of no known kind; give a file of text"
    return None


def unknown_text(head: bytes) -> str:
    """Return words for a text of no known format, and some advice."""
    begin = head.lstrip()
    if begin.startswith((b"{", b"[")):
        keys = re.findall(rb'"([^"\\]{1,40})"\s*:', begin)
        names = [key.decode("utf-8", "replace") for key in dict.fromkeys(keys)]
        kind = f"JSON with the keys {', '.join(names[:5])}," if names else "JSON"
    else:
        first = begin.partition(b"\n")[0].decode("utf-8", "replace").strip()
        kind = f"text that begins with {shown(first)},"
    return (
        f"{kind} of no known format ({', '.join(TRACE_FORMATS)}); if it is one of them, name it "
        "with --trace-format"
    )
