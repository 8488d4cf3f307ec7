"""Windows and macOS, imitated on Linux: the program finishes, and nothing half-written is left."""

from __future__ import annotations

import ntpath
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.servers import Schedule, serving

import batchbench
from batchbench.batching.models.source import ModelSpec, find_model
from batchbench.errors import UsageError
from batchbench.files import STAGING, default_folders
from batchbench.reports import output

PACKAGE = Path(batchbench.__file__).parent
TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux imitates the others")


def acted(system: str, folder: Path, *commands: str, code: str = "") -> str:
    """Run commands, or code of ours, in a folder as on another system; return all output."""
    script = ["-m", "support.platforms", system, *" + ".join(commands).split()]
    if code:
        before = f"import sys; from support.platforms import *; act({system!r})"
        file = folder / "ours.py"
        file.write_text(code, encoding="utf-8")
        run = f"exec(compile(open({str(file)!r}).read(), PACKAGE + 'x.py', 'exec'), names)"
        script = ["-c", f"{before}; names = {{'__name__': 'batchbench.x'}}; {run}"]
    done = subprocess.run(
        [sys.executable, *script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TESTS), "TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to run in, with one for temporary files."""
    (tmp_path / "tmp").mkdir()
    return tmp_path


SYSTEMS = pytest.mark.parametrize("system", ["win32", "darwin"])


def assert_clean(folder: Path, system: str) -> None:
    """Assert that nothing half-written is left, nor a lock but of Windows, where filelock acts."""
    assert not [p for p in folder.rglob("*") if p.name.startswith(STAGING)]
    assert system == "win32" or not list(folder.glob("tmp/batchbench-locks-*/*"))


# The imitation


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import fcntl", "ModuleNotFoundError: No module named 'fcntl'"),
        ("import os\nos.fork()", "AttributeError: module 'os' has no attribute 'fork'"),
        ("import signal\nsignal.SIGKILL", "has no attribute 'SIGKILL'"),
        ("import sys\nassert sys.platform == 'win32'\nraise KeyError", "KeyError"),
        ("open('/proc/self/stat')", "No such file or directory: '/proc/self/stat'"),
        ("import os\nf = open('a', 'w')\nos.remove('a')", "used by another process: 'a'"),
        ("import os\nos.mkdir('d')\nf = open('d/a', 'w')\nos.replace('d', 'e')", "another process"),
        ("import os\nos.mkdir('d')\nos.mkdir('e')\nos.replace('d', 'e')", "Access is denied"),
        ("import os\nos.open('.', os.O_RDONLY)", "Permission denied: '.'"),
        ("open('a:b', 'w')", "Invalid argument: 'a:b'"),
        ("from pathlib import Path\nPath('a.').mkdir()", "Invalid argument: 'a.'"),
        ("open('nul.txt', 'w')", "Invalid argument: 'nul.txt'"),
        ("import os\nf = open('a', 'w')\nf.close()\nos.remove('a')\nraise KeyError", "KeyError"),
    ],
)
def test_the_imitation_refuses_what_windows_refuses(folder: Path, code: str, said: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(said)):
        acted("win32", folder, code=code)


def test_libraries_see_the_true_system(folder: Path) -> None:
    code = "import psutil\nassert psutil.sys.platform == 'linux'\npsutil.virtual_memory()"
    acted("win32", folder, code=code)


# The program


@SYSTEMS
def test_results_are_made_replaced_read_and_compared(system: str, folder: Path) -> None:
    shape = "--batch-size 2 --queue-size 6 --quiet"
    acted(
        system,
        folder,
        f"simulate {shape} --output a",
        f"simulate {shape} --output a --overwrite",
        f"simulate {shape}",
        "report a --format html --output a.html --quiet",
        "report a --format markdown --output a.md --quiet",
        "compare a a --quiet --junit a.xml",
        "sweep --simulated --queue-size 6 --batch-size 2,3 --quiet --output s",
        "sweep --simulated --queue-size 6 --batch-size 2,3 --quiet --output s",
    )
    assert_clean(folder, system)
    assert len(list((folder / "batchbench-results").iterdir())) == 1


@SYSTEMS
def test_a_model_is_run_without_a_compiler_and_the_facts_of_linux(
    system: str, folder: Path
) -> None:
    size = "--batch-size 2 --queue-size 3 --trials 1 --max-time 600"
    acted(system, folder, f"run --model toy-gpt2 {size} --quiet --output a")
    result = batchbench.load(folder / "a")
    assert result.data["verification"]["passed"] is True
    assert "native" not in str(result.data["model"].get("cpu_kernels"))
    assert_clean(folder, system)


@SYSTEMS
def test_a_server_is_measured_without_stamps_of_the_kernel(system: str, folder: Path) -> None:
    with serving(Schedule(step_ns=5_000_000)) as server:
        size = "--batch-size 2 --queue-size 4 --output-tokens 8 --trials 1"
        acted(system, folder, f"run --target {server.url} {size} --quiet --output a")
    (trial,) = batchbench.load(folder / "a").data["strategies"]["continuous"]["trials"]
    assert trial["completed"] == 4
    # The steps of time.monotonic on Windows are longer than those of this server.
    assert trial["median_itl_ms"] > 4  # on a busy machine it may be any multiple
    assert_clean(folder, system)


# Names and paths


def test_what_is_measured_is_not_timed_in_steps_of_windows() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert "monotonic_ns" not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize(
    ("model", "end"),
    [
        ("org/name", "-org--name"),
        (r"C:\models\gpt2", "-C--models--gpt2"),
        ("./a/b.", "-.--a--b"),
        ('a"b<c>|d?*', "-a--b--c--d--"),
    ],
)
def test_a_default_folder_has_a_name_that_all_systems_allow(model: str, end: str) -> None:
    name = next(default_folders(model)).name
    assert name.endswith(end)


@pytest.mark.parametrize("model", [r"models\gpt2", r"C:\gpt2", "C:/gpt2"])
def test_a_path_of_windows_is_a_folder_and_no_id_of_the_hub(model: str) -> None:
    with pytest.raises(UsageError, match="no such file or folder; give a checkpoint's folder"):
        find_model(ModelSpec(model))


def test_pictures_on_another_drive_are_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timeline.png").touch()

    def relpath(*_: object) -> str:
        return ntpath.relpath(r"D:\a", r"C:\b")

    with pytest.raises(ValueError, match="path is on mount"):
        relpath()
    monkeypatch.setattr(output.os.path, "relpath", relpath)
    pictures = output._pictures(tmp_path, Path("elsewhere"))
    assert pictures == {"timeline": (tmp_path / "timeline.png").as_posix()}
