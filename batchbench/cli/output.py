"""The output of a command: its folder, and the lines that end what it prints."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from batchbench.errors import Interrupted, OutputError
from batchbench.files import ClaimedError, check_folder, claimed

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> Console:
    """Return a console on standard output that prints text as it is."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def print_ending(console: Console, command: str, files: Iterable[Path]) -> None:
    """Print how to repeat a command, on one line to be copied, and which files it wrote."""
    console.print(f"\nAgain: {command}", soft_wrap=True)
    written = list(files)
    folder = written[0].parent
    names = {f.name: None for f in written if f.parent == folder and f.suffix in _SHOWN_FILES}
    console.print(f"Files: {shlex.quote(str(folder))}/ with {', '.join(names)}")


_SHOWN_FILES = (".json", ".html", ".csv", ".png")


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
        given: the folder of ``--output``; None to take the first of ``defaults`` that is free.
        overwrite: replace a result that the folder holds.
        marker: the file that shows that a folder holds a result.
        lost: end of the line about Ctrl-C if no result was written.

    Raises:
        UsageError: it cannot be written, holds a result, or another process writes there.
        Interrupted: by Ctrl-C, or by another signal that asks the program to stop.
        OutputError: standard output cannot be written; the message says where the result is.
    """
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
        claim = ExitStack()
        try:
            claim.enter_context(claimed(folder, f"--output {folder}"))
        except ClaimedError:
            continue
        if not folder.exists():
            stack.enter_context(claim)
            return folder
        claim.close()
    raise AssertionError("the defaults never end")


def _stamp(file: Path) -> tuple[int, int] | None:
    """Return a value that changes when a file is rewritten; None if there is no file."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns
