"""The writer of files: claims, whole or nothing, and places that cannot be written."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.programs import PLAIN, program

import batchbench
from batchbench import files
from batchbench.cli.output import output_folder
from batchbench.errors import Interrupted, OutputError, UsageError
from batchbench.files import (
    ClaimedError,
    check_file,
    check_folder,
    claimed,
    default_folders,
    replacing,
    undisturbed,
    write_file,
    write_whole,
)

CONTENTS = {"result.json": "{}", "recordings/0.npz": b"\x00", "requests.csv": "é"}


def everything_in(folder: Path) -> list[str]:
    """Return all files and folders, including hidden ones."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Whole or nothing


def test_a_new_folder_appears_with_its_missing_parents(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"
    assert write_whole(folder, CONTENTS) == [folder / name for name in CONTENTS]
    assert (folder / "requests.csv").read_bytes() == "é".encode()
    assert everything_in(tmp_path) == [
        *("a", "a/b", "a/b/c", "a/b/c/recordings"),
        *(f"a/b/c/{name}" for name in ("recordings/0.npz", "requests.csv", "result.json")),
    ]


@pytest.mark.parametrize("above", ["", "a/b"])
def test_a_failed_write_leaves_nothing(above: str, tmp_path: Path) -> None:
    def fail(folder: bool) -> None:
        with replacing(tmp_path / above / "it", folder=folder) as staging:
            (staging / "part" if folder else staging).write_text("half", encoding="utf-8")
            raise RuntimeError

    for folder in (False, True):
        with pytest.raises(RuntimeError):
            fail(folder)
    assert everything_in(tmp_path) == []


def test_a_parent_folder_made_meanwhile_is_used(tmp_path: Path) -> None:
    with replacing(tmp_path / "a" / "b", folder=True) as staging:
        (staging / "ours").touch()
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").touch()
    assert everything_in(tmp_path) == ["a", "a/b", "a/b/ours", "a/theirs"]


def test_a_result_written_meanwhile_is_never_replaced(tmp_path: Path) -> None:
    """Two machines that share a disk do not see each other's claims."""
    folder, fill = tmp_path / "mine", files._fill

    def meanwhile(*asked: object, **more: bool) -> None:
        fill(*asked, **more)  # type: ignore[arg-type]
        folder.mkdir()
        (folder / "result.json").write_text("theirs", encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_fill", meanwhile)
        with pytest.raises(UsageError, match="mine: cannot be written: another run wrote there"):
            write_whole(folder, CONTENTS)
    assert everything_in(tmp_path) == ["mine", "mine/result.json"]
    assert (folder / "result.json").read_text(encoding="utf-8") == "theirs"


KILLED = """
import os, signal, sys
from pathlib import Path
from batchbench.files import write_whole
contents = {"result.json": "new", "recordings/0.npz": b"new", "requests.csv": "new"}
for place in range(0, 4000, 7):
    folder = Path(str(place)) / "mine"
    if sys.argv[1] == "over":
        write_whole(folder, dict.fromkeys(contents, "old"))
    else:
        folder.parent.mkdir()
    child = os.fork()
    if child == 0:
        left = place + 1
        def count(*_):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count)
        write_whole(folder, contents)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(place)
"""
"""A program that writes a result again and again and is killed a few calls later each time."""


@pytest.mark.parametrize("there", ["new", "over"])
def test_a_kill_at_any_call_leaves_nothing_or_a_whole_result(there: str, tmp_path: Path) -> None:
    out, err = program(there, cwd=tmp_path, code=KILLED).communicate()
    last = int(out or err)
    assert 100 < last < 3900
    for place in range(0, last + 1, 7):
        folder = tmp_path / str(place) / "mine"
        if there == "new":
            assert everything_in(folder) == sorted([*CONTENTS, "recordings"]) or not folder.exists()
        if (folder / "result.json").exists():
            texts = {(folder / name).read_text(encoding="utf-8") for name in CONTENTS}
            assert texts in ({"old"}, {"new"})
        with claimed(folder, "it"):  # the next run removes what is left
            assert not [name for name in everything_in(folder.parent) if ".writing" in name]


def test_signals_wait_until_a_result_is_whole() -> None:
    done = []

    def work() -> None:
        with undisturbed():
            for step in (1, 2):
                signal.raise_signal(signal.SIGINT)
                done.append(step)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_write_too(tmp_path: Path) -> None:
    thread = threading.Thread(target=write_file, args=(tmp_path / "it", "text"))
    thread.start()
    thread.join()
    assert (tmp_path / "it").read_text(encoding="utf-8") == "text"


# Claims


def test_a_place_has_one_claim_by_any_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path / "it", tmp_path / "link" / "it", tmp_path / "x" / ".." / "it"):
        with (
            claimed(tmp_path / "it", "--output it"),
            pytest.raises(ClaimedError, match=r"^--output it: another batchbench is writing"),
            claimed(path, "--output it"),
        ):
            pass
        with claimed(tmp_path / "other", "other"), claimed(path, "it"):
            pass
    assert everything_in(tmp_path) == ["link"]


def test_a_killed_process_holds_no_claim(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom batchbench.files import claimed\n"
        "with claimed(Path('it'), 'it'):\n    print('here', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=PLAIN,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.kill()
        process.wait()
    with claimed(tmp_path / "it", "it"):
        pass


def test_two_default_folders_of_one_second_are_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [Path("results") / name for name in ("a", "a-2", "a-3")]
    with output_folder(None, names) as first, output_folder(None, names) as second:
        write_whole(first, CONTENTS)
        write_whole(second, CONTENTS)
    with output_folder(None, names) as third:
        pass
    assert [first, second, third] == names
    assert next(default_folders("a/b", "ladder")).name.endswith("-ladder-a--b")


@pytest.mark.parametrize(
    "words",
    [
        "simulate --queue-size 8",
        "simulate --queue-size 8 --overwrite",
        "sweep --simulated --queue-size 8",
        "capacity --simulated --slo ttft:50 --queue-size 100",
        "report one two --format markdown --quiet",
        "workload save",
        "baseline save",
        "trend one",
        "reproduce one",
        "ladder",
        "breakeven",
    ],
)
def test_the_second_run_into_a_folder_is_refused(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        if name in words:
            batchbench.simulate(queue_size=8, seed=len(name)).save(name)
    option = [] if words == "workload save" else ["--output"]
    with claimed(Path("mine"), "mine"):
        said = refused(*words.split(), *option, "mine")
    assert "mine: another batchbench is writing there; wait for it, or give another name" in said
    assert not Path("mine").exists()


def test_one_of_two_simultaneous_runs_is_refused(tmp_path: Path) -> None:
    words = ("simulate", "--queue-size", "8", "--output", "two", "--quiet")
    both = [program(*words, cwd=tmp_path) for _ in range(2)]
    said = [process.communicate()[1].decode() for process in both]
    codes = sorted(process.returncode for process in both)
    # One of them may have ended before the other has begun.
    assert codes == [0, 2], said
    assert sum(map(len, (text.splitlines() for text in said))) == 1
    assert (tmp_path / "two" / "result.json").exists()


# The line of an interrupted command


def test_the_context_says_what_is_lost_or_where_the_results_are(tmp_path: Path) -> None:
    folder = tmp_path / "mine"

    def work(end: BaseException, *, writes: bool) -> None:
        with output_folder(folder, overwrite=True) as place:
            if writes:
                write_whole(place, CONTENTS)
            raise end

    with pytest.raises(Interrupted, match=r"^interrupted; nothing was kept$"):
        work(KeyboardInterrupt(), writes=False)
    with pytest.raises(OutputError, match=r"^full$"):
        work(OutputError("full"), writes=False)
    for _ in range(2):
        with pytest.raises(Interrupted, match=r"^interrupted; the results are in .*mine$"):
            work(KeyboardInterrupt(), writes=True)
        with pytest.raises(OutputError, match=r"^full; the results are in .*mine$"):
            work(OutputError("full"), writes=True)
    with pytest.raises(UsageError, match="holds a result"), output_folder(folder):
        pass
    assert everything_in(tmp_path / "mine") == sorted([*CONTENTS, "recordings"])


# Places that cannot be written


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("file", "not a directory"),
        ("file/below", "not a directory"),
        ("loop", "too many levels of symbolic links"),
        ("loop/below", "too many levels of symbolic links"),
        ("a" * 300, "file name too long"),
        ("new/" + "a" * 300, "file name too long"),
        ("new/" + "a/" * 3000, "file name too long"),
        ("a\0b", "embedded null byte"),
        ("/proc/nowhere", ""),
    ],
    ids=lambda value: value[:12].replace("\0", "0"),
)
def test_an_unwritable_place_is_refused_before_the_run(
    place: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    with pytest.raises(UsageError, match=f"^--output .*: cannot be written: {why}"):
        check_folder(Path(place), overwrite=True)
    with pytest.raises(UsageError, match=f"^--output .*: cannot be written: {why}"):
        check_file(Path(place) / "report.html", "--output")
    assert everything_in(tmp_path) == ["file", "loop"]


@pytest.mark.parametrize("name", ["a b", "line\nbreak", "🚀", "é", "\udcff", "-x", "a'b\"c"])
def test_unusual_names_work(name: str, tmp_path: Path) -> None:
    words = ("simulate", "--queue-size", "8", f"--output=./{name}")
    process = program(*words, cwd=tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert b"Page:  " in out
    process = program("report", f"./{name}", "--format", "html", "--quiet", cwd=tmp_path)
    assert (process.communicate()[1], process.returncode) == (b"", 0)
    assert os.path.exists(tmp_path / name / "report.html")


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_is_one_line_and_keeps_the_old_result(there: bool, tmp_path: Path) -> None:
    """Limit files to 3,000 bytes, which the result's first file exceeds."""
    code = (
        "import resource, sys\nfrom batchbench.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\nmain()\n"
    )
    folder = tmp_path / "mine"
    if there:
        write_whole(folder, CONTENTS)
    words = ("simulate", "--queue-size", "8", "--output", "mine", "--overwrite", "--quiet")
    process = program(*words, cwd=tmp_path, code=code)
    out, err = process.communicate()
    assert (out, process.returncode) == (b"", 2)
    assert err == b"batchbench: --output mine: cannot be written: file too large\n"
    kept = ["mine", *(f"mine/{name}" for name in [*CONTENTS, "recordings"])] if there else []
    assert everything_in(tmp_path) == sorted(kept)


def test_a_folder_that_was_deleted_meanwhile_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "mine"
    folder.mkdir(parents=True)
    with output_folder(folder) as place:
        folder.rmdir()
        folder.parent.rmdir()
        write_whole(place, CONTENTS)
    assert (folder / "result.json").exists()


def test_a_deleted_current_folder_is_one_line(tmp_path: Path) -> None:
    script = 'mkdir gone; cd gone; rmdir ../gone; exec "$@"'
    words = [sys.executable, "-P", "-m", "batchbench", "simulate"]
    env = {**PLAIN, "PYTHONPATH": str(Path(batchbench.__file__).parents[1])}
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], cwd=tmp_path, env=env, capture_output=True
    )
    line = b"batchbench: the current folder was deleted; change to one that exists\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", line)


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_a_simulation_needs_no_home_and_no_cache(home: str | None, tmp_path: Path) -> None:
    env = {"HOME": home} if home else {}
    words = ("simulate", "--queue-size", "8", "--output", "mine", "--quiet")
    code = (
        "import os\nfrom batchbench.cli.main import main\n"
        + ("" if home else "os.environ.pop('HOME', None)\n")
        + "main()\n"
    )
    process = program(*words, cwd=tmp_path, env=env, code=code)
    out, err = process.communicate()
    assert process.returncode == 0
    assert out.count(b"\n") == 1
    # matplotlib runs fc-list, which says so where it can keep no cache.
    assert [line for line in err.splitlines() if not line.startswith(b"Fontconfig error")] == []


# All files are UTF-8


PACKAGE = Path(batchbench.__file__).parent


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.name)
def test_no_file_is_opened_in_the_encoding_of_the_locale(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = {keyword.arg for keyword in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if name in ("read_text", "write_text") and not ("encoding" in given or "utf-8" in modes):
            pytest.fail(f"{file.name}:{node.lineno}: {name} without encoding")
        starts = name in ("run", "Popen", "call", "check_call", "check_output")
        if starts and given & {"text", "universal_newlines"}:
            assert "encoding" in given, f"{file.name}:{node.lineno}"
