"""Output of a command: the standard streams, its folder, and the last lines that it prints.

The streams work in any encoding: a missing character is replaced by one that looks like it. If
standard output is closed or full, that is one of our errors; on standard error it is ignored.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import shlex
import shutil
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len

from batchbench.errors import ClosedPipe, Interrupted, OutputError
from batchbench.files import ClaimedError, check_folder, claimed, reason_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

STAND_INS, JSON_ESCAPES = "batchbench", "batchbench-json"
"""Names of error handlers: one replaces characters by similar ones, in text for people; the other
writes ``\\u00d7`` for ``×``, which JSON reads as the same."""

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
    """Replace the standard streams by ours."""
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
        ClosedPipe: its reader has gone.
        OutputError: it cannot be written.
    """

    def write(self, text: str) -> int:
        return int(self._attempt(super().write, text))

    def flush(self) -> None:
        self._attempt(super().flush)

    def _attempt(self, action: Callable[..., Any], *given: str) -> Any:
        try:
            return action(*given)
        except OSError as error:
            _silence(self.fileno())
            self._fail(error)
            return 0

    def _fail(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise ClosedPipe("the reader of standard output has gone") from error
        if error.errno == errno.EBADF:
            raise OutputError("standard output is closed") from error
        raise OutputError(f"standard output cannot be written: {reason_of(error)}") from error


class _Messages(_Output):
    """Standard error; its errors are ignored, so that they never end a run of hours."""

    def _fail(self, error: OSError) -> None:
        pass


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


def _wrapped(kind: type[_Output], stream: TextIO | None, descriptor: int) -> _Output:
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


def make_console() -> Console:
    """Return a console on standard output that prints text as it is."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def show(
    options: Any,
    text: str,
    sentence: str,
    rendered: RenderableType,
    command: str,
    files: Sequence[Path],
    *,
    more: str | None = None,
) -> None:
    """Print a result as its JSON text, as one sentence, or with how to repeat it and its files.

    ``options`` has the flags ``json`` and ``quiet``; ``more`` is the command that shows all of a
    result, given its folder.
    """
    if options.json:
        echo_json(text)
    elif options.quiet:
        echo(sentence)
    else:
        console = make_console()
        console.print(rendered)
        if files:
            print_ending(console, command, files, more=more)


def print_ending(
    console: Console, command: str, files: Sequence[Path], *, more: str | None = None
) -> None:
    """Print how to repeat a command, if that is known, and which files it wrote."""
    console.print(f"\nAgain: {command}" if command else "", soft_wrap=True)
    folder = files[0].parent
    if more is not None:
        console.print(f"More:  {more} {shlex.quote(str(folder))}", soft_wrap=True)
        console.print(f"Page:  {shlex.quote(str(folder / 'report.html'))}", soft_wrap=True)
        return
    names = {f.name: None for f in files if f.parent == folder and f.suffix in _SHOWN_FILES}
    console.print(f"Files: {shlex.quote(str(folder))}/ with {', '.join(names)}")


_SHOWN_FILES = (".json", ".html", ".csv", ".png")


SILENCE_S = 10.0
"""Maximum time without a line in a log."""


@contextmanager
def reminding(
    what: str, say: Callable[[str], object], every_s: float | None = None
) -> Iterator[None]:
    """Say every ten seconds that ``what`` still goes on, until the block ends."""
    over, began = threading.Event(), time.monotonic()

    def remind() -> None:
        while not over.wait(every_s or SILENCE_S):
            say(f"still {what}, {time.monotonic() - began:.0f} s so far")

    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def patience(what: str, about: str, *, quiet: bool = False) -> Iterator[None]:
    """Say on standard error what takes ``about`` so long, and again every ten seconds."""
    if quiet:
        yield
        return
    echo(f"{what} ({about}) …", err=True)
    with reminding(what, partial(echo, err=True)):
        yield


@contextmanager
def interruptible(lost: str) -> Iterator[None]:
    """Turn Ctrl-C in the block into one line that ends with ``lost``.

    Raises:
        Interrupted: by Ctrl-C, or by another signal that asks the program to stop.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {lost}") from error


@contextmanager
def output_folder(
    given: Path | None,
    defaults: Iterable[Path] = (),
    *,
    overwrite: bool = False,
    marker: str = "result.json",
    lost: str = "nothing was kept",
) -> Iterator[Path]:
    """Yield the folder that a command writes to; no other process writes there meanwhile.

    The folder is made only by :func:`~batchbench.files.write_whole`. The output of the block is
    flushed before the folder is released.

    Args:
        given: the folder of ``--output``; None to take the first of ``defaults`` that is free, or
            to write nothing if there are no defaults.
        overwrite: replace a result that the folder holds.
        marker: the file that shows that a folder holds a result.
        lost: end of the line about Ctrl-C if no result was written.

    Raises:
        UsageError: it cannot be written, holds a result, or another process writes there.
        Interrupted: by Ctrl-C, or by another signal that asks the program to stop.
        OutputError: standard output cannot be written; the message says where the result is.
    """
    if given is None and not defaults:
        with interruptible(lost):
            yield Path()
        return
    with ExitStack() as stack:
        folder = _claim_free(defaults, stack) if given is None else given
        if given is not None:
            stack.enter_context(claimed(folder, f"--output {folder}"))
        check_folder(folder, overwrite=overwrite, marker=marker)
        before = _stamp(folder / marker)
        try:
            try:
                yield folder
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt as error:
            kept = _stamp(folder / marker) != before
            end = f"the results are in {folder}" if kept else lost
            raise Interrupted(f"interrupted; {end}") from error
        except OutputError as error:
            if _stamp(folder / marker) == before:
                raise
            raise OutputError(f"{error}; the results are in {folder}") from error


def _claim_free(defaults: Iterable[Path], stack: ExitStack) -> Path:
    """Claim the first folder that does not exist and that no other process has claimed."""
    for folder in defaults:
        with ExitStack() as claim, suppress(ClaimedError):
            claim.enter_context(claimed(folder, f"--output {folder}"))
            if not folder.exists():
                stack.push(claim.pop_all())
                return folder
    raise AssertionError("the defaults never end")


def _stamp(file: Path) -> tuple[int, int] | None:
    """Return a value that changes when a file is rewritten; None if there is no file."""
    with suppress(OSError):
        facts = file.stat()
        return facts.st_ino, facts.st_mtime_ns
    return None
