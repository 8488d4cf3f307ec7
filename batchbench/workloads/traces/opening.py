"""Trace files as streams of text: decompression, decoding, and files that are not traces."""

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
from pathlib import Path
from typing import Any, BinaryIO, TextIO

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

_MARKED = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins like that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def open_trace(file: Path, where: str) -> Iterator[tuple[TextIO, bytes, str]]:
    """Open a trace; yield its text, its first 64 KiB in UTF-8, and ``a gzip archive`` or the like.

    Bytes that are not UTF-8 become unpaired surrogates. Errors of reading in the body of the with
    statement are UsageErrors too.
    """
    archive = ""
    try:
        with open_binary(file, where) as raw:
            stream, head = _looked_at(raw)
            for magic, kind, unpacked in _ARCHIVES:
                if head.startswith(magic):
                    archive = kind
                    stream, head = _looked_at(unpacked(stream))
                    break
            encoding = next((name for mark, name in _MARKED if head.startswith(mark)), "utf-8")
            if encoding != "utf-8":
                head = head.decode(encoding, "ignore").encode()
            errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
            if old_mac := b"\r" in head and b"\n" not in head:
                head = head.replace(b"\r", b"\n")
            yield (
                io.TextIOWrapper(stream, encoding, errors, None if old_mac else "\n"),
                head,
                archive,
            )
    except (EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
        raise UsageError(f"{where}: is {archive} that cannot be read: {error}") from error
    except UnicodeError as error:
        raise UsageError(
            f"{where}: is not the kind of text that its first bytes indicate: {error}"
        ) from error
    except OSError as error:
        what = f"is {archive} that " if archive else ""
        raise UsageError(f"{where}: {what}cannot be read: {reason_of(error)}") from error


def _looked_at(source: Any) -> tuple[io.BufferedReader, bytes]:
    """Return a stream of the source, whose reads are whole, and its beginning."""
    stream = io.BufferedReader(source, HEAD_BYTES)
    return stream, stream.peek()


class _XzFile(io.RawIOBase):
    """The content of an xz archive, in bounded memory, which ``lzma.LZMAFile`` does not offer."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._begin()

    def _begin(self) -> None:
        self._decoder = lzma.LZMADecompressor(memlimit=_MOST_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            piece = b""
            if self._decoder.eof:  # streams may follow one another, with padding between them
                piece = self._decoder.unused_data.lstrip(b"\0")
                while not piece:
                    if not (piece := self._source.read(HEAD_BYTES)):
                        return 0
                    piece = piece.lstrip(b"\0")
                self._begin()
            elif self._decoder.needs_input and not (piece := self._source.read(HEAD_BYTES)):
                raise EOFError("it ends early")
            if data := self._decoder.decompress(piece, len(buffer)):
                buffer[: len(data)] = data
                return len(data)


def _zstd_file(source: BinaryIO) -> zstd.ZstdFile:
    limit = {int(zstd.DecompressionParameter.window_log_max): _MOST_MEMORY.bit_length() - 1}
    return zstd.ZstdFile(source, options=limit)


_ARCHIVES: tuple[tuple[bytes, str, Callable[[BinaryIO], Any]], ...] = (
    (b"\x1f\x8b", "a gzip archive", lambda source: gzip.GzipFile(fileobj=source)),
    (b"BZh", "a bzip2 archive", bz2.BZ2File),
    (b"\xfd7zXZ\x00", "an xz archive", lambda source: io.BufferedReader(_XzFile(source))),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _zstd_file),
    (b"\x50\x2a\x4d\x18", "a zstd archive", _zstd_file),  # as pzstd writes
)


# Files that are not traces

_UNPACK = "unpack it and give the file inside"
_TABLE = "save it as CSV"
_EXPORT = "save it as CSV, such as with pandas' to_csv"
_DATA = "give the data themselves"

_KINDS = (
    (rb"PK\x03\x04.*(?:\[Content_Types\]\.xml|xl/)", "a spreadsheet", _TABLE),
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive", _UNPACK),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a spreadsheet or another Office file", _TABLE),
    (rb"PAR1", "a parquet file", _EXPORT),
    (rb"(?:ARROW1|FEA1)", "an Arrow file", _EXPORT),
    (rb"ORC", "an ORC file", _EXPORT),
    (rb"Obj\x01", "an Avro file", _EXPORT),
    (rb"\x89HDF\r\n", "an HDF5 file", _EXPORT),
    (rb"\x93NUMPY", "a NumPy array", _EXPORT),
    (rb"SQLite format 3\x00", "an SQLite database", "save its table as CSV"),
    (rb"\x80[\x02-\x05]", "a Python pickle", "save it as CSV or JSON"),
    (rb"%PDF-", "a PDF", _DATA),
    (rb"(?:\x89PNG|\xff\xd8\xff|GIF8)", "a picture", _DATA),
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
    *((re.escape(magic), kind, _UNPACK) for magic, kind, _ in _ARCHIVES),  # inside another
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
    if len(head.translate(None, _TEXT)) * 20 > len(head):
        return "binary data of no known kind; give a file of text"
    return None


def unknown_text(head: str) -> str:
    """Return words for a text of no known format, and some advice."""
    begin = head.lstrip()
    if begin.startswith(("{", "[")):
        names = list(dict.fromkeys(re.findall(r'"([^"\\]{1,40})"\s*:', begin)))
        kind = f"JSON with the keys {', '.join(names[:5])}," if names else "JSON"
    else:
        kind = f"text that begins with {shown(begin.partition(chr(10))[0].strip())},"
    return (
        f"{kind} of no known format ({', '.join(TRACE_FORMATS)}); if it is one of them, name it "
        "with --trace-format"
    )
