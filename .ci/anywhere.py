#!/usr/bin/env python3
"""Run the tests as other machines would, and print a table of the outcomes.

    .venv/bin/python .ci/anywhere.py                         under each variation, in turn
    .venv/bin/python .ci/anywhere.py --only cp1252           under one
    .venv/bin/python .ci/anywhere.py --only cp1252+dumb      under two at once
    .venv/bin/python .ci/anywhere.py -- tests/test_cli.py -x arguments for pytest

The exit code is 1 if a run failed. ``another-user`` needs Linux and root: it runs a read-only copy
of the working tree as ``nobody``, who has no home.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = ("g++", "c++", "gcc", "cc", "clang", "clang++", "x86_64-linux-gnu-g++")
NOBODY = 65534


@dataclass(frozen=True)
class Variation:
    """The differences between a machine and this one.

    Attributes:
        set: environment variables.
        unset: environment variables that are taken away.
        umask: bits that new files lack.
        one_core: only one processor core may be used.
        no_compiler: no C++ compiler is on the path.
        another_user: see above.
        background: SIGINT and SIGHUP are ignored, as in a background job or under nohup.
        arguments: of pytest.
    """

    set: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    umask: int = -1
    one_core: bool = False
    no_compiler: bool = False
    another_user: bool = False
    background: bool = False
    arguments: tuple[str, ...] = ()

    def __or__(self, other: Variation) -> Variation:
        return Variation(
            self.set | other.set,
            self.unset + other.unset,
            max(self.umask, other.umask),
            self.one_core or other.one_core,
            self.no_compiler or other.no_compiler,
            self.another_user or other.another_user,
            self.background or other.background,
            self.arguments + other.arguments,
        )


VARIATIONS = {
    "plain": Variation(),
    # The processor
    "avx2": Variation({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "sse": Variation({"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "amx": Variation({"TEST_PROCESSOR": "sapphirerapids"}),
    "intel": Variation({"TEST_PROCESSOR": "cooperlake"}),
    "arm64": Variation({"TEST_PROCESSOR": "arm64"}),
    "older": Variation(
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "PYTHONIOENCODING": "cp1252",
            "LC_ALL": "C",
            "TERM": "dumb",
        },
        unset=("HOME",),
        no_compiler=True,
    ),
    "one-core": Variation(one_core=True),
    "no-compiler": Variation(no_compiler=True),
    # The language, the terminal and the clock
    "cp1252": Variation({"PYTHONIOENCODING": "cp1252"}),
    "c-locale": Variation({"LC_ALL": "C"}, ("LANG",)),
    "ascii": Variation({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "dumb": Variation({"TERM": "dumb"}),
    "narrow": Variation({"COLUMNS": "40", "LINES": "10"}),
    "no-colour": Variation({"NO_COLOR": "1"}),
    "colour": Variation({"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TTY_COMPATIBLE": "1"}),
    "time-zone": Variation({"TZ": "XYZ-12:45"}),
    "github": Variation({"CI": "true", "GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": "/nowhere"}),
    # The user
    "no-home": Variation(
        unset=("HOME", "USERPROFILE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "USER", "LOGNAME")
    ),
    "umask": Variation(umask=0o077),
    "another-user": Variation(another_user=True),
    "background": Variation(background=True),
    # The network
    "offline": Variation({"HF_HUB_OFFLINE": "1"}),
    "online": Variation(unset=("HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN")),
    "proxy": Variation({"HTTPS_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "socks5://127.0.0.1:1"}),
    # The order
    "hash-seed": Variation({"PYTHONHASHSEED": "1234"}),
    "order": Variation({"TEST_ORDER": "5"}),
    "one-process": Variation(arguments=("-p", "no:xdist")),
    "two-processes": Variation(arguments=("-n", "2", "--dist", "loadfile")),
}


@contextmanager
def path_without_compilers(path: str) -> Iterator[str]:
    """Make a folder of links to all programs on a path except compilers."""
    with tempfile.TemporaryDirectory(prefix="anywhere-path-") as folder:
        os.chmod(folder, 0o755)
        for place in path.split(os.pathsep):
            for program in Path(place).iterdir() if Path(place).is_dir() else ():
                link = Path(folder, program.name)
                if not program.name.startswith(COMPILERS) and not link.is_symlink():
                    link.symlink_to(program)
        yield folder


@contextmanager
def read_only_copy() -> Iterator[Path]:
    """Copy the files of the working tree, without history, to a folder that all users may read."""
    with tempfile.TemporaryDirectory(prefix="anywhere-tree-") as folder:
        os.chmod(folder, 0o755)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        for name in filter(None, names.decode().split("\0")):
            if (ROOT / name).is_file():
                copy = Path(folder, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy)
        subprocess.run(["chmod", "-R", "a+rX,a-w", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["chmod", "-R", "u+w", folder], check=True)


def as_nobody(command: list[str], stack: ExitStack) -> list[str]:
    """Return a command that another user runs, with access to a closed folder around Python.

    That happens within a view of the file system of the command's own; nothing else changes.
    """
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *command]
    base = Path(sys.base_prefix).resolve()
    closed = [p for p in reversed(base.parents) if not p.stat().st_mode & 0o001]
    if not closed:
        return become
    held = stack.enter_context(tempfile.TemporaryDirectory(prefix="anywhere-python-"))
    script = (
        'mask=$(umask) && umask 022 && mount --bind "$1" "$2" && '
        'mount -t tmpfs -o mode=755 none "$3" && mkdir -p "$1" && mount --bind "$2" "$1" && '
        'umount "$2" && umask "$mask" && shift 3 && exec "$@"'
    )
    view = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    return [*view, str(base), held, str(closed[0]), *become]


def run(variation: Variation, arguments: list[str], log: Path) -> int:
    """Return the exit code of pytest under a variation; write its output to ``log``."""
    environment = {k: v for k, v in os.environ.items() if k not in variation.unset}
    environment |= {"PYTHONPATH": str(ROOT), **variation.set}
    command = [sys.executable, "-m", "pytest", *variation.arguments, *arguments]
    folder = ROOT
    with ExitStack() as stack:
        if variation.no_compiler:
            path = stack.enter_context(path_without_compilers(os.environ["PATH"]))
            environment["PATH"] = path
        if variation.another_user:
            folder = stack.enter_context(read_only_copy())
            environment |= {"PYTHONPATH": str(folder), "HOME": "/nonexistent"}
            command = as_nobody(command, stack)
        if variation.one_core:
            command = ["taskset", "-c", "0", *command]
        if variation.background:
            command = ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", *command]
        with log.open("wb") as file:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                umask=variation.umask,
                check=False,
            )
    return done.returncode


def impossible(variation: Variation) -> str:
    """Return the reason why a variation cannot run here; empty if it can."""
    if variation.another_user and (not sys.platform.startswith("linux") or os.geteuid() != 0):
        return "needs Linux and root"
    if variation.one_core and not shutil.which("taskset"):
        return "needs taskset"
    return ""


def last_line(log: Path) -> str:
    """Return the last line of pytest's output, without its rule and colours."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\x1b", "")
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip(" =") if lines else "no output"


def main() -> int:
    """Run the chosen variations; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME[+NAME]",
        help=f"variations, several at once with +; known: {', '.join(VARIATIONS)}",
    )
    parser.add_argument("--logs", type=Path, help="folder for what pytest says in each run")
    parser.add_argument("arguments", nargs="*", help="arguments for pytest, after --")
    given = parser.parse_args()
    asked = given.only or list(VARIATIONS)
    if unknown := {n for names in asked for n in names.split("+")} - VARIATIONS.keys():
        parser.error(f"--only {sorted(unknown)[0]}: known are {', '.join(VARIATIONS)}")
    logs = given.logs or Path(tempfile.mkdtemp(prefix="anywhere-"))
    logs.mkdir(parents=True, exist_ok=True)
    failed = 0
    width = max(map(len, asked))
    for name in asked:
        variation = reduce(Variation.__or__, (VARIATIONS[n] for n in name.split("+")))
        if why := impossible(variation):
            print(f"{name:{width}}  skipped: {why}", flush=True)
            continue
        began = time.monotonic()
        log = logs / f"{name}.log"
        code = run(variation, given.arguments, log)
        failed += code != 0
        outcome = f"{'passed' if code == 0 else 'FAILED'}  {time.monotonic() - began:4.0f} s"
        print(f"{name:{width}}  {outcome}  {last_line(log)}", flush=True)
        if code:
            print(log.read_text(encoding="utf-8", errors="replace")[-5000:], flush=True)
    print(f"logs: {logs}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
