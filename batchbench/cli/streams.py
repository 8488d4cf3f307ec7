"""Standard output and standard error: any encoding, and no traceback if they are closed or full.

A character that the encoding lacks is replaced by one that looks like it. An error of the system
becomes one of ours on standard output. On standard error, which shows progress, it is ignored.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import shutil
import sys
import textwrap
import unicodedata
from typing import TextIO

from rich.cells import cell_len

from batchbench.errors import BatchbenchError, ClosedPipe, OutputError
from batchbench.files import reason_of

STAND_INS = "batchbench"
"""Name of the error handler that replaces characters by similar ones, in text for people."""

JSON_ESCAPES = "batchbench-json"
"""Name of the error handler that writes ``\\u00d7`` for ``×``, which JSON reads as the same."""

_CHOSEN = ("ignore", "replace", "xmlcharrefreplace", "namereplace")
"""Error handlers of ``PYTHONIOENCODING`` that are kept, since they cannot fail."""

_LOOK_ALIKES = dict(
    zip(
        "×·–—−÷αλµμ²³±─━╌│┃…▁▂▃▄▅▆▇█▓▒░╱■□●◆▏▎▍▌▋▊▉•«»“”‘’",
        "x.---/aluu23~---||~._-=+*##%:./#.oo|||||||*<>''''",
        strict=True,
    )
) | {"→": "->", "≤": "<=", "≥": ">=", "≈": "~", "√": "sqrt", "∞": "inf", "∝": "~", "⁷": "7"}


def prepare() -> None:
    """Replace the two streams by :class:`_Output` and :class:`_Messages`."""
    register()
    _fill_closed()
    sys.stdout = _wrapped(_Output, sys.stdout, 1)
    sys.stderr = _wrapped(_Messages, sys.stderr, 2)


def register() -> None:
    """Register the error handlers :data:`STAND_INS` and :data:`JSON_ESCAPES`."""
    codecs.register_error(STAND_INS, _stand_in)
    codecs.register_error(JSON_ESCAPES, _json_escape)


def echo(text: str = "", *, err: bool = False, end: str = "\n") -> None:
    """Print a line at once, on standard output or standard error; a terminal wraps it at words."""
    stream = sys.stderr if err else sys.stdout
    if end == "\n" and stream.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    stream.write(text + end)
    stream.flush()


def echo_json(text: str) -> None:
    """Print a JSON document, which means the same in any encoding."""
    register()
    encoding = sys.stdout.encoding or "utf-8"
    echo(text.encode(encoding, JSON_ESCAPES).decode(encoding), end="")


def echo_html(text: str) -> None:
    """Print a page, which a browser shows the same in any encoding, although it claims UTF-8."""
    encoding = sys.stdout.encoding or "utf-8"
    if not encoding.lower().startswith("utf"):
        text = text.encode("ascii", "xmlcharrefreplace").decode("ascii")
    echo(text, end="")


class _Output(io.TextIOWrapper):
    """Standard output.

    Raises:
        ClosedPipe: nobody reads it any more.
        OutputError: it cannot be written.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise self._failure(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> BatchbenchError:
        _silence(self.fileno())
        if isinstance(error, BrokenPipeError):
            return ClosedPipe("nobody reads standard output any more")
        if error.errno == errno.EBADF:
            return OutputError("standard output is closed")
        return OutputError(f"standard output cannot be written: {reason_of(error)}")


class _Messages(io.TextIOWrapper):
    """Standard error; its errors are ignored, so that they never end a run of hours."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            _silence(self.fileno())
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            _silence(self.fileno())


def _silence(descriptor: int) -> None:
    """Discard what is buffered and everything that follows."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _fill_closed() -> None:
    """Open closed descriptors, so that no other file gets the number of a standard stream.

    Closed output is opened for reading, so that writing to it is still an error.
    """
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free number


def _wrapped(
    kind: type[_Output] | type[_Messages], stream: TextIO | None, descriptor: int
) -> _Output | _Messages:
    """Return a stream like another one; None stands for a stream that was closed."""
    if stream is None:
        raw = open(descriptor, "wb", closefd=False)  # noqa: SIM115  # open until the program ends
        return kind(raw, encoding="utf-8", errors=STAND_INS)
    assert isinstance(stream, io.TextIOWrapper)
    return kind(
        stream.buffer,
        encoding=stream.encoding,
        errors=stream.errors if stream.errors in _CHOSEN else STAND_INS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks, each by one of the same width if there is one."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    before = error.object[: error.start]
    return "".join(_look_alike(c, before + lacking[:i]) for i, c in enumerate(lacking)), error.end


def _look_alike(character: str, before: str) -> str:
    if character == "…" and before.endswith(" "):  # ends a sentence, not a cell that was cut
        return "..."
    known = _LOOK_ALIKES.get(character)
    if known is None:
        name = unicodedata.name(character, "")
        known = "+" if name.startswith("BOX DRAWINGS") else ""
    plain = known or unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain or "?" * cell_len(character)


def _json_escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = (units[i : i + 2].hex() for i in range(0, len(units), 2))
    return "".join(f"\\u{pair}" for pair in pairs), error.end
