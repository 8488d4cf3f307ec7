"""The action and the examples of docs/ci.md: valid, and what the scripts do is tried out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = ROOT / "action.yml"
PAGE = ROOT / "docs" / "ci.md"


def action() -> dict[str, Any]:
    """The action's definition."""
    found: dict[str, Any] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    return found


def script(number: int) -> dict[str, Any]:
    """One of the action's steps that run a script."""
    steps = [step for step in action()["runs"]["steps"] if "run" in step]
    found: dict[str, Any] = steps[number]
    return found


def validate(schema: str, file: Path) -> None:
    """Hold a file against the schema of schemastore.org that check-jsonschema brings along."""
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", file],
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr


def examples() -> dict[str, str]:
    """The YAML examples of the page, by the file that each is."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(# \.\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(re.findall("^```yaml", text, re.MULTILINE))
    return {f"{name.removeprefix('# ')}": body for name, body in blocks}


def test_the_action_is_as_github_publishes() -> None:
    validate("github-actions", ACTION)


@pytest.mark.parametrize("name", examples())
def test_an_example_is_as_its_service_publishes(name: str, tmp_path: Path) -> None:
    (tmp_path / "example.yml").write_text(examples()[name])
    schema = "gitlab-ci" if "gitlab" in name else "github-workflows"
    validate(schema, tmp_path / "example.yml")


def test_what_examples_hand_to_the_action_are_inputs_of_it() -> None:
    known = action()
    for name, body in examples().items():
        if "gitlab" in name:
            continue
        for job in yaml.safe_load(body)["jobs"].values():
            for step in job["steps"]:
                if "/batchbench@" in step.get("uses", ""):
                    assert set(step["with"]) <= set(known["inputs"])
        for output in re.findall(r"steps\.gate\.outputs\.([\w-]+)", body):
            assert output in known["outputs"]


def test_scripts_are_bash_and_hold_no_text_of_a_workflow() -> None:
    for step in action()["runs"]["steps"]:
        if "run" in step:
            assert "${{" not in step["run"]
            subprocess.run(["bash", "-n", "-c", step["run"]], check=True)


def test_every_input_is_used_and_every_output_set() -> None:
    text = ACTION.read_text(encoding="utf-8")
    for name in action()["inputs"]:
        assert f"inputs.{name}" in text
    set_by_the_command = {"answer", "exit-code"}  # batchbench.cli.gate sets them as well
    for name in action()["outputs"]:
        assert f'"{name}=' in text or name in set_by_the_command


# The script that runs batchbench, with a batchbench that only says how it was called


@dataclass(frozen=True)
class Ran:
    """The exit code and output of the script."""

    code: int
    calls: list[list[str]]
    outputs: dict[str, str]
    summary: str
    said: str


Runner = Callable[..., Ran]

FAKE = """#!{python}
import os, pathlib, sys
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as out:
    out.write("\\0".join(words) + "\\n")
def after(option):
    return pathlib.Path(words[words.index(option) + 1])
if words[0] == "report":
    after("--output").write_text("the report\\n")
    sys.exit(0)
code = int(os.environ["CODE"])
if words[0] == "run":
    if code < 2:
        after("--output").mkdir()
        (after("--output") / "result.json").touch()
elif code in (0, 1, 3):
    after("--markdown").touch()
    after("--junit").touch()
sys.exit(code)
"""


@pytest.fixture
def run(tmp_path: Path) -> Runner:
    """Runs the script as GitHub's runner runs it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "batchbench").write_text(FAKE.format(python=sys.executable))
    (tools / "batchbench").chmod(0o755)

    def call(code: int = 0, **inputs: str) -> Ran:
        files = {
            name: tmp_path / name for name in ("CALLS", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")
        }
        for file in files.values():
            file.write_text("")
        step = script(1)
        given = {"args": "--preset ci", "strict": "false", **inputs}
        env = {
            name: given.get(expression.removeprefix("${{ inputs.").removesuffix(" }}"), "")
            for name, expression in step["env"].items()
        }
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            capture_output=True,
            encoding="utf-8",
            env={
                "PATH": f"{tools}:{os.environ['PATH']}",
                "RUNNER_TEMP": str(tmp_path),
                "CODE": str(code),
                **env,
                **{name: str(file) for name, file in files.items()},
            },
        )
        lines = files["GITHUB_OUTPUT"].read_text().splitlines()
        return Ran(
            done.returncode,
            [line.split("\0") for line in files["CALLS"].read_text().splitlines()],
            dict(line.split("=", 1) for line in lines),
            files["GITHUB_STEP_SUMMARY"].read_text(),
            done.stdout + done.stderr,
        )

    return call


@pytest.mark.parametrize("code", [0, 1, 2, 3, 70])
@pytest.mark.parametrize("command", ["duet", "check", "compare", "run"])
def test_the_exit_code_is_handed_on(run: Runner, command: str, code: int) -> None:
    ran = run(code, command=command)
    assert (ran.code, ran.outputs["exit-code"]) == (code, str(code)), ran.said
    assert ("report" in ran.outputs) == (code in (0, 1) or (code == 3 and command != "run"))
    assert ("junit" in ran.outputs) == (command != "run" and code in (0, 1, 3))


def test_options_reach_the_command_as_they_were_written(run: Runner) -> None:
    words = ["--max-time", "60", "--fail-if", "output_throughput < -5%", "$(touch here)", "a'b", ""]
    ran = run(command="duet", args=shlex.join(words), strict="true", **{"base-ref": "main; id"})
    ((name, *given),) = ran.calls
    assert name == "duet"
    assert given[: len(words)] == words
    assert given[given.index("--base-ref") + 1] == "main; id"
    assert "--strict" in given
    assert "--baseline" not in given
    ((_, *given),) = run(command="check", baseline="my baseline.json").calls
    assert given[given.index("--baseline") + 1] == "my baseline.json"
    assert "--strict" not in given


def test_a_run_is_reported_in_the_summary(run: Runner) -> None:
    ran = run(1, command="run")
    assert [words[0] for words in ran.calls] == ["run", "report"]
    assert (ran.summary, ran.outputs["answer"]) == ("the report\n", "failed")
    assert (Path(ran.outputs["result"]) / "result.json").is_file()


@pytest.mark.parametrize("inputs", [{"command": "rm"}, {"command": "duet", "args": "it's"}])
def test_a_wrong_input_is_a_wrong_question_and_runs_nothing(
    run: Runner, inputs: dict[str, str]
) -> None:
    ran = run(**inputs)
    assert (ran.code, ran.outputs, ran.calls) == (2, {"exit-code": "2"}, [])
    assert "::error title=batchbench::" in ran.said
