"""Measure everything that this project asks of a GPU, in three calls of at most 9, 6 and 8 minutes.

    python benchmarks/gpu_first_run.py --part 1 --output DIR    # facts, tests, kernels one by one
    python benchmarks/gpu_first_run.py --part 2 --output DIR    # runs of batchbench
    python benchmarks/gpu_first_run.py --part 3 --output DIR    # ladders
    python benchmarks/gpu_page.py DIR                           # figures into docs/performance.md

Each step is a process of its own with a time limit, so that a step that fails or hangs costs only
itself. A part prints one line a step and writes three files: DIR/part-N.json (figures, rewritten
after each step), DIR/part-N.log (all output) and DIR/part-N.tar.gz (complete results). Nothing is
installed or downloaded; models have dummy weights of true shapes. ``--limit S`` ends a part
earlier. ``--stand-in`` tries all of it on a machine without a GPU: tiny models on the tests'
stand-in for CUDA, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = ROOT / "benchmarks" / "gpu_steps.py"

LIMITS_S = {1: 540.0, 2: 360.0, 3: 480.0}
"""Seconds of each part."""

LEAST_S = 10.0
"""Seconds that must be left before another step is started."""

RESULT = "RESULT "
"""Prefix of the line in which a step prints its figures as JSON."""

LEAK = re.compile(r"nanobind: | - (leaked|\.\.\. skipped)|See https://nanobind")
"""Lines that Triton's bindings print when a process ends."""

RUN_FACTS = ("model", "workload", "comparison", "verification", "validity", "environment")
LADDER_FACTS = ("model", "workload", "card", "rungs", "left_out", "validity", "environment")


@dataclass(frozen=True)
class Step:
    """A command with a limit in seconds; ``folder`` is where batchbench writes its result."""

    name: str
    words: Sequence[str]
    limit_s: float
    folder: str | None = None


@dataclass(frozen=True)
class Setup:
    """The machine to run on: the words that start Python, models by name, and sizes."""

    python: Sequence[str]
    gpt2: str
    xl: str
    llama: str
    queue: int  # requests of the longest run
    length: int  # tokens of the longest request in "step gpt2"
    mixed: Sequence[str]  # options of the run of mixed lengths
    tests: str  # selects the tests of this machine, for ``pytest -k``
    compiles: bool  # inductor compiles for real devices only
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def real(cls, folder: Path) -> Setup:
        return cls(
            python=(sys.executable,),
            gpt2="gpt2",
            xl="gpt2-xl",
            llama=write_config(folder / "llama-1b", LLAMA_1B),
            queue=256,
            length=512,
            mixed=(
                *("--batch-size", "32", "--queue-size", "256", "--verify", "64"),
                *("--prompt-tokens", "16:256", "--output-tokens", "8:256"),
            ),
            tests="real",
            compiles=True,
        )

    @classmethod
    def stand_in(cls, folder: Path) -> Setup:
        """Return a set-up of tiny models, whose processes believe that they have a GPU."""
        return cls(
            python=(sys.executable, "-m", "support.cuda_stand_in"),
            gpt2=write_config(folder / "gpt2", TINY_GPT2),
            xl=write_config(folder / "gpt2-xl", TINY_GPT2 | {"n_layer": 3}),
            llama=write_config(folder / "llama-1b", LLAMA_1B | TINY_LLAMA),
            queue=16,
            length=100,
            mixed=("--queue-size", "12", "--prompt-tokens", "4:16", "--output-tokens", "4:16"),
            tests="stand",
            compiles=False,
            environment={"GPU_STEPS_QUICK": "1"},
        )


LLAMA_1B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
"""The shape of Llama 3.2 with 1B parameters."""

TINY_LLAMA = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 320,
    "n_embd": 64,
    "n_head": 1,
    "n_layer": 2,
    "n_positions": 256,
}


def write_config(folder: Path, config: Mapping[str, Any]) -> str:
    """Write the configuration of a model with dummy weights and return its folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def steps_of_part_1(setup: Setup) -> list[Step]:
    def tests(expression: str) -> Sequence[str]:
        # Without the launcher: the tests set the stand-in up themselves.
        pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10")
        return (*pytest, "tests/batching/test_gpu.py", "-k", f"{setup.tests} and {expression}")

    def step(name: str, *words: object) -> Sequence[str]:
        return (*setup.python, str(STEPS), name, *map(str, words))

    gpt2, xl = setup.gpt2, setup.xl
    steps = [
        Step("facts", step("facts"), 60),
        Step("tests", tests("not compile"), 200),
        Step("kernels gpt2", step("kernels", gpt2), 60),
        Step("kernels gpt2-xl", step("kernels", xl), 60),
        Step("step gpt2, 8 rows", step("anatomy", gpt2, 8, 64), 60),
        Step("step gpt2-xl, 8 rows", step("anatomy", xl, 8, 64), 90),
        Step("step llama 1B, 8 rows", step("anatomy", setup.llama, 8, 64), 90),
        Step("step gpt2, 32 rows", step("anatomy", gpt2, 32, setup.length), 60),
    ]
    return steps + [Step("tests of compiled code", tests("compile"), 120)] * setup.compiles


def steps_of_part_2(setup: Setup) -> list[Step]:
    def run(name: str, *words: str, limit: float = 90, model: str = setup.gpt2) -> Step:
        return command(setup, name, ("run", "--model", model, *words), limit)

    many, some = str(setup.queue), str(max(16, setup.queue // 4))
    both = "continuous,generate_batch"
    dry_run = ("run", "--model", setup.xl, "--dry-run", "--load-format", "dummy")
    return [
        run("run classic", limit=60),
        run("run of many", "--queue-size", many, "--trials", "4"),
        run("run llama 1B", "--queue-size", some, "--verify", "16", model=setup.llama),
        run("run to eos", "--queue-size", some, "--stop-at-eos"),
        run("run at a rate", "--queue-size", some, "--request-rate", "50", "--prefill", "separate"),
        run("run of mixed lengths", *setup.mixed),
        run("run float16", "--queue-size", some, "--dtype", "float16", limit=60),
        run("run float32", "--queue-size", some, "--dtype", "float32", limit=60),
        run("run generate_batch", "--queue-size", some, "--strategy", both),
        Step("dry run", (*setup.python, "-m", "batchbench", *dry_run, "--device", "cuda"), 60),
    ]


def steps_of_part_3(setup: Setup) -> list[Step]:
    def ladder(name: str, model: str, rungs: str, *more: str, limit: float) -> Step:
        return command(setup, name, ("ladder", "--model", model, "--rungs", rungs, *more), limit)

    gpt2, short = setup.gpt2, ("--dtype", "bfloat16")
    classic = "notebook,generate_batch,slots,lean,graph"
    queue = ("--queue-size", str(max(16, setup.queue // 8)))
    steps = [
        ladder("ladder gpt2", gpt2, classic, *short, limit=200),
        ladder("ladder gpt2-xl", setup.xl, "notebook,lean,graph", *short, *queue, limit=160),
        ladder(
            "ladder llama 1B", setup.llama, "generate_batch,lean,graph", *short, *queue, limit=160
        ),
        ladder("ladder gpt2 float32", gpt2, "all", "--dtype", "float32", limit=120),
    ]
    compiled = ladder("ladder gpt2 compiled", gpt2, "graph,compile", *short, limit=180)
    return steps + [compiled] * setup.compiles


def command(setup: Setup, name: str, words: Sequence[str], limit_s: float) -> Step:
    folder = name.replace(" ", "-")
    options = ("--load-format", "dummy", "--device", "cuda", "--output", folder)
    return Step(name, (*setup.python, "-m", "batchbench", *words, *options), limit_s, folder)


PARTS = {1: steps_of_part_1, 2: steps_of_part_2, 3: steps_of_part_3}


def perform(
    step: Step, limit_s: float, work: Path, environment: Mapping[str, str]
) -> tuple[dict[str, Any], str]:
    """Run a step in ``work``; return its figures, and all that it printed."""
    began = time.monotonic()
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "COLUMNS": "100",
        **environment,
    }
    # Tests are named from the root of the checkout; results go into folders of ``work``.
    where = ROOT if "pytest" in step.words else work
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            code = subprocess.run(
                step.words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                env=variables,
                cwd=where,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        output.seek(0)
        text = output.read()
    lines = [line for line in text.splitlines() if line.strip() and not LEAK.match(line)]
    result = next((json.loads(x[len(RESULT) :]) for x in lines if x.startswith(RESULT)), None)
    if step.folder is not None:
        result = result_of(work / step.folder)
    figures = {
        "command": " ".join(step.words),
        "exit_code": code,
        "seconds": round(time.monotonic() - began, 1),
        "result": result,
        "last_lines": lines[-8:],
    }
    return figures, text


def result_of(folder: Path) -> dict[str, Any] | None:
    """Return what matters of the result in a folder; None if there is none."""
    for name, keys in (("result.json", RUN_FACTS), ("ladder.json", LADDER_FACTS)):
        if (folder / name).is_file():
            result = json.loads((folder / name).read_text(encoding="utf-8"))
            facts = {key: result.get(key) for key in keys}
            if "strategies" in result:
                facts["strategies"] = {
                    strategy: {"summary": arm["summary"], "counters": arm["counters"]}
                    for strategy, arm in result["strategies"].items()
                }
            return facts
    return None


def write_atomically(path: Path, text: str) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def run_part(part: int, setup: Setup, output: Path, limit_s: float) -> bool:
    """Run the steps of a part; return True if every step ended with exit code 0."""
    output.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), dict[str, Any]()
    with (
        tempfile.TemporaryDirectory() as scratch,
        (output / f"part-{part}.log").open("w", encoding="utf-8") as log,
    ):
        work = Path(scratch)
        for step in PARTS[part](setup):
            left = limit_s - (time.monotonic() - began)
            if left < LEAST_S:
                done[step.name] = {"skipped": "no time left"}
                print(f"{step.name:26} skipped: no time left", flush=True)
                continue
            figures, text = perform(step, min(step.limit_s, left), work, setup.environment)
            done[step.name] = figures
            log.write(f"===== {step.name} (exit code {figures['exit_code']})\n{text}\n")
            log.flush()
            write_atomically(output / f"part-{part}.json", json.dumps(done, indent=1) + "\n")
            last = figures["last_lines"][-1][:60] if figures["last_lines"] else ""
            code, seconds = figures["exit_code"], figures["seconds"]
            print(f"{step.name:26} exit {code} {seconds:6.1f} s  {last}", flush=True)
        with tarfile.open(output / f"part-{part}.tar.gz", "w:gz") as archive:
            archive.add(work, arcname=f"part-{part}")
    return all(figures.get("exit_code") == 0 for figures in done.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=int, choices=sorted(PARTS), required=True)
    parser.add_argument("--output", type=Path, default=Path("gpu-first-run"), metavar="DIR")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds for the whole part")
    parser.add_argument("--stand-in", action="store_true", help="try it without a GPU")
    options = parser.parse_args()
    limit_s = options.limit or LIMITS_S[options.part]
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup.stand_in(Path(folder)) if options.stand_in else Setup.real(Path(folder))
        if not run_part(options.part, setup, options.output.resolve(), limit_s):
            sys.exit(1)


if __name__ == "__main__":
    main()
