"""A revision of batchbench's own repository, installed beside the present one."""

from __future__ import annotations

import compileall
import io
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import batchbench
from batchbench.errors import UsageError, shown
from batchbench.files import reason_of, replacing

_READY = "ready"


def install_revision(revision: str, cache: Path | None = None) -> tuple[Path, str]:
    """The interpreter of an environment that holds batchbench as of ``revision``, and the commit.

    The environment is kept in a cache by commit. Its batchbench is the package as committed; all
    else it takes from the present environment, so that the two differ in batchbench alone.

    Args:
        revision: whatever git takes for a commit: a branch, a tag, ``HEAD~1``.
        cache: folder of the environments; None for the user's.

    Raises:
        UsageError: there is no repository, no such revision, or it cannot be installed.
    """
    root = repository()
    commit = (
        _git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
    )
    if not commit:
        raise UsageError(
            f"--base-ref {shown(revision)}: {root} has no such commit; fetch it (in a "
            "shallow clone: git fetch --unshallow), or name one that git log shows"
        )
    folder = (cache or cache_folder()) / f"{commit[:16]}-{_present()}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / _READY).exists():
        _install(root, commit, folder)
    return python, commit


def repository() -> Path:
    """The checkout that batchbench runs from, or the one of batchbench that one stands in.

    Raises:
        UsageError: there is none.
    """
    for root in (Path(batchbench.__file__).parents[1], *(Path.cwd() / "x").parents):
        if (root / ".git").exists() and (root / "batchbench" / "__init__.py").exists():
            return root
    raise UsageError(
        "--base-ref: needs a git checkout of batchbench to stand in; give --base-python instead"
    )


def cache_folder() -> Path:
    """Return the folder of environments, in ``$BATCHBENCH_CACHE`` or else the user's cache.

    Raises:
        UsageError: the user has no home folder.
    """
    given = os.environ.get("BATCHBENCH_CACHE")
    if given:
        return Path(given) / "revisions"
    try:
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise UsageError(
            "--base-ref: there is no home folder to keep environments in; set BATCHBENCH_CACHE to "
            "a folder"
        ) from error
    return usual / "batchbench" / "revisions"


def _present() -> str:
    """A short name of the present environment, in which the others of a cache are rooted."""
    import hashlib

    about = f"{sys.version}\n{sysconfig.get_path('purelib')}"
    return hashlib.sha256(about.encode()).hexdigest()[:8]


def _install(root: Path, commit: str, folder: Path) -> None:
    """Make the environment whole or not at all."""
    archive = _git(root, "archive", "--format=tar", commit, "batchbench")
    if not archive:
        raise UsageError(f"--base-ref {commit[:12]}: has no package batchbench")
    try:
        with replacing(folder, folder=True) as staging:
            _fill(staging, archive)
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete environment
    except OSError as error:
        raise UsageError(
            f"{folder.parent}: cannot be written: {reason_of(error)}; set BATCHBENCH_CACHE to "
            "another folder"
        ) from error


def _fill(staging: Path, archive: bytes) -> None:
    """Make the environment in an empty folder."""
    venv.create(staging, symlinks=os.name != "nt")
    library = next(staging.glob("[Ll]ib/**/site-packages"))
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(library, filter="data")
    # After its own batchbench come all packages of the present environment, with those that its
    # .pth files add. The line is ASCII, since Python reads it in the locale's encoding.
    present = [
        *site.getsitepackages(),
        site.getusersitepackages(),
        sysconfig.get_path("purelib"),
    ]
    lines = [f"import site; site.addsitedir({place!a})\n" for place in dict.fromkeys(present)]
    (library / "present.pth").write_text("".join(lines), encoding="ascii")
    compileall.compile_dir(library / "batchbench", quiet=2)
    (staging / _READY).touch()


def _git(root: Path, *words: str) -> bytes:
    """What git prints; empty where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--base-ref: git cannot be run ({error})") from error
    return done.stdout if done.returncode == 0 else b""
