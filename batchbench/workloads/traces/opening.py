"""Trace files as streams of UTF-8 text: decompression, decoding, a look at the beginning."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from batchbench.errors import UsageError
from batchbench.files import open_binary, reason_of
from batchbench.workloads.traces.contents import HEAD_BYTES

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_MOST_MEMORY = 2**27
"""Most memory of a decompressor; xz -9 needs 65 MiB, zstd --long 128 MiB."""

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
        UsageError: it cannot be opened or read; the message begins with ``where``. The body of the
            with statement may raise it too.
    """
    archive = ""
    try:
        with open_binary(file, where) as raw:
            head, stream = _looked_at(raw)
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
            f"{where}: is not the text that its first bytes announce: {error}"
        ) from error
    except OSError as error:
        what = f"is {archive} that " if archive else ""
        raise UsageError(f"{where}: {what}cannot be read: {reason_of(error)}") from error


def _looked_at(source: io.RawIOBase | BinaryIO) -> tuple[bytes, BinaryIO]:
    """Return the beginning of a stream, and a stream of the whole."""
    head = b""
    while len(head) < HEAD_BYTES and (more := source.read(HEAD_BYTES - len(head))):
        head += more
    chained = _Chained(head, cast(BinaryIO, source))
    return head, cast(BinaryIO, io.BufferedReader(chained, HEAD_BYTES))


class _Chained(io.RawIOBase):
    """A stream of bytes that were read already and of the rest."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = memoryview(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._head[: len(buffer)] if self._head else self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class _Decoder(Protocol):
    """A decompressor of the standard library for one stream or frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Unpacked(io.RawIOBase):
    """The content of an xz or zstd archive, in bounded memory."""

    def __init__(self, source: BinaryIO, new: Callable[[], _Decoder]) -> None:
        self._source, self._new = source, new
        self._decoder = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            piece = b""
            if self._decoder.eof:  # streams may follow one another, with padding between them
                piece = self._decoder.unused_data.lstrip(b"\0")
                while not piece:
                    if not (piece := self._source.read(HEAD_BYTES)):
                        return 0
                    piece = piece.lstrip(b"\0")
                self._decoder = self._new()
            elif self._decoder.needs_input and not (piece := self._source.read(HEAD_BYTES)):
                raise EOFError("it ends early")
            if data := self._decoder.decompress(piece, len(buffer)):
                buffer[: len(data)] = data
                return len(data)


class _Translated(io.RawIOBase):
    """A stream with each piece changed by a function; the last call has no bytes."""

    def __init__(self, source: BinaryIO, change: Callable[[bytes], bytes]) -> None:
        self._source, self._change = source, change
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            piece = self._source.read(HEAD_BYTES)
            self._ready = memoryview(self._change(piece))
            if not piece:
                break
        data = self._ready[: len(buffer)]
        self._ready = self._ready[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def _decoded(head: bytes, stream: BinaryIO) -> tuple[bytes, BinaryIO]:
    """Return the beginning of a text and a stream of it, as UTF-8 whose lines end in ``\\n``."""
    encoding = next((name for mark, name in _ENCODINGS if head.startswith(mark)), None)
    if head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        head, stream = _looked_at(stream)
    elif encoding is not None:
        decoder = codecs.getincrementaldecoder(encoding)()
        head, stream = _looked_at(
            _Translated(stream, lambda piece: decoder.decode(piece, not piece).encode())
        )
    if b"\r" in head and b"\n" not in head:  # as old Macs write it
        return _looked_at(_Translated(stream, lambda piece: piece.replace(b"\r", b"\n")))
    return head, stream


def _of_gzip(source: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=source, mode="rb"))


def _of_bzip2(source: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, bz2.BZ2File(source))


def _of_xz(source: BinaryIO) -> BinaryIO:
    new = partial(lzma.LZMADecompressor, memlimit=_MOST_MEMORY)
    return cast(BinaryIO, _Unpacked(source, new))


def _of_zstd(source: BinaryIO) -> BinaryIO:
    limit = {int(zstd.DecompressionParameter.window_log_max): _MOST_MEMORY.bit_length() - 1}
    return cast(BinaryIO, _Unpacked(source, partial(zstd.ZstdDecompressor, options=limit)))


_ARCHIVES: tuple[tuple[bytes, str, Callable[[BinaryIO], BinaryIO]], ...] = (
    (b"\x1f\x8b", "a gzip archive", _of_gzip),
    (b"BZh", "a bzip2 archive", _of_bzip2),
    (b"\xfd7zXZ\x00", "an xz archive", _of_xz),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _of_zstd),
    (b"\x50\x2a\x4d\x18", "a zstd archive", _of_zstd),  # as pzstd writes
)
