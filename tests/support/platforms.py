"""Windows and macOS as our modules would see them, on Linux, as far as Python can imitate them.

Run the program with it in a process of its own, with ``tests`` on the path::

    PYTHONPATH=tests python -m support.platforms win32 simulate -o a + report a --format json

Only modules of batchbench see another system; libraries see the true one. There

* ``sys.platform`` and ``os.name`` are those of the system, and what it lacks is missing;
* ``time.monotonic`` has the steps that it has on Windows before Python 3.13;
* ``/proc`` and ``/sys`` do not exist.

On Windows, moreover, an open file can be neither moved, removed nor replaced, and neither can a
folder that contains one; no folder can be opened or replaced; and no name can be made that Windows
forbids.
"""

from __future__ import annotations

import builtins
import os
import re
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = str(Path(__file__).parents[2] / "batchbench") + os.sep
STANDARD = sysconfig.get_path("stdlib") + os.sep
CLOCK_STEP_S = 0.015625


@dataclass(frozen=True)
class Platform:
    """The differences between a system and Linux.

    Attributes:
        modules: names of modules that it lacks.
        missing: names that a module lacks, by the module's name.
        given: names that a module has otherwise, by the module's name.
    """

    modules: tuple[str, ...] = ()
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_LINUX_ONLY = {
    "os": ("sched_getaffinity", "sched_setaffinity"),
    "socket": ("SO_TIMESTAMPNS", "SO_PEERCRED", "TCP_QUICKACK"),
}

PLATFORMS = {
    "darwin": Platform(missing=_LINUX_ONLY, given={"sys": {"platform": "darwin"}}),
    "win32": Platform(
        modules=("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"),
        missing={
            "os": (
                *_LINUX_ONLY["os"],
                *("fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "killpg", "setsid"),
                *("O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "mkfifo", "nice", "pread", "pwrite"),
                *("set_blocking", "statvfs", "sysconf", "uname", "wait", "wait4", "fchmod"),
            ),
            "signal": (
                "SIGHUP",
                "SIGKILL",
                "SIGUSR1",
                "SIGALRM",
                "SIGPIPE",
                "alarm",
                "pthread_kill",
            ),
            "socket": ("AF_UNIX", "SO_REUSEPORT", *_LINUX_ONLY["socket"]),
            "time": ("tzset", "clock_gettime", "clock_gettime_ns", "CLOCK_MONOTONIC"),
        },
        given={
            "os": {"name": "nt"},
            "sys": {"platform": "win32"},
            "time": {"monotonic": lambda: time.monotonic() // CLOCK_STEP_S * CLOCK_STEP_S},
        },
    ),
}


class Reduced(ModuleType):
    """A module as it is on another system."""

    def __init__(self, module: ModuleType, missing: tuple[str, ...], given: Mapping[str, Any]):
        super().__init__(module.__name__)
        self._module, self._missing = module, missing
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r}")
        return getattr(self._module, name)


def act(name: str) -> None:
    """Let the modules of batchbench that are imported from now on see another system."""
    assert not any(n.startswith("batchbench.") for n in sys.modules)
    platform = PLATFORMS[name]
    reduced = {
        module: Reduced(__import__(module), platform.missing.get(module, ()), given)
        for module in {*platform.missing, *platform.given}
        for given in [platform.given.get(module, {})]
    }
    true_import = builtins.__import__

    def imported(module: str, names: Any = None, *rest: Any, **more: Any) -> ModuleType:
        if names and str(names.get("__name__")).partition(".")[0] == "batchbench":
            if module in platform.modules:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)
            if module in reduced:
                return reduced[module]
        return true_import(module, names, *rest, **more)

    builtins.__import__ = imported
    sys.addaudithook(_Files(windows=name == "win32"))


class _Files:
    """Refuse what the other system would refuse to do with files."""

    def __init__(self, *, windows: bool) -> None:
        self._windows, self._busy = windows, False

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if self._busy or event.partition(".")[0] not in ("open", "os", "shutil"):
            return
        self._busy = True
        try:
            self._check(event, given)
        finally:
            self._busy = False

    def _check(self, event: str, given: tuple[Any, ...]) -> None:
        paths = [os.fsdecode(p) for p in given[:2] if isinstance(p, (str, bytes, os.PathLike))]
        if not paths or (event in _AT_DESCRIPTOR and given[-1] != -1):
            return  # the standard library's way to empty a folder
        if event == "open":
            flags = given[2] if isinstance(given[2], int) else 0
            self._check_open(paths[0], bool(flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)))
        elif self._windows and _by_us():
            if event == "os.symlink":
                raise OSError(22, "A required privilege is not held by the client", paths[0])
            if event in ("os.mkdir", "os.rename"):
                _check_name(paths[-1])
            if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                for path in paths:
                    _check_closed(path)
            if event == "os.rename" and os.path.isdir(paths[1]):
                raise PermissionError(13, "Access is denied", paths[1])

    def _check_open(self, path: str, writes: bool) -> None:
        if path.startswith(("/proc/", "/sys/")):
            if _by_us():
                raise FileNotFoundError(2, "No such file or directory", path)
        elif self._windows and not path.startswith("/dev/"):
            if os.path.isdir(path) and _by_us(direct=True):
                raise PermissionError(13, "Permission denied", path)
            if writes:
                _check_name(path)


_AT_DESCRIPTOR = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")
"""Events whose last argument is the descriptor of a folder, or -1."""


def _by_us(*, direct: bool = False) -> bool:
    """Return True if code of batchbench asked for it, itself or through the standard library."""
    frame = sys._getframe(1)
    while frame:
        file = frame.f_code.co_filename
        library = file.startswith(STANDARD) and "-packages" not in file
        if file != __file__ and (direct or not (library or file.startswith("<frozen"))):
            return file.startswith(PACKAGE)
        frame = frame.f_back  # type: ignore[assignment]
    return False


_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.I)


def _check_name(path: str) -> None:
    for part in Path(path).parts:
        if part not in (os.sep, "..") and _FORBIDDEN.search(part):
            raise OSError(22, "Invalid argument", path)


def _check_closed(path: str) -> None:
    """Refuse to touch a file that this process has open, or a folder that contains one."""
    top = os.path.realpath(path)
    for number in os.listdir("/proc/self/fd"):
        try:
            held = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if (held == top or held.startswith(top + os.sep)) and not os.path.isdir(held):
            raise PermissionError(13, "The file is being used by another process", path)


def main() -> None:
    """Run the commands after the name of the system, which ``+`` separates, until one fails."""
    act(sys.argv[1])
    from batchbench.cli import output
    from batchbench.cli.main import run_command

    output.prepare()
    words = " ".join(sys.argv[2:]).split(" + ")
    sys.exit(next((code for command in words if (code := run_command(command.split()))), 0))


if __name__ == "__main__":
    main()
