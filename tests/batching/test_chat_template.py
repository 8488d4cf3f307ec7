"""Prompts of a file in the chat template of the model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import TEMPLATE, write_gguf
from support.models import LLAMA, MakeModel
from support.program import Program, here, program
from support.servers import Manner
from support.wired import URL, wired
from transformers import AutoTokenizer

from batchbench.batching.models import encoder, find_tokenizer
from batchbench.errors import UsageError
from batchbench.workloads.spec import WorkloadSpec

__all__ = ["here", "program"]

CHAT = "/v1/chat/completions"
PROMPTS = ("The quick brown fox", "A request is written into its slot. {{ 7 * 7 }}")


@pytest.fixture
def chatty(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint whose tokenizer has a chat template."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "chatty"))
    set_template(folder, TEMPLATE)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def set_template(folder: Path, template: str | None) -> None:
    known: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        known["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(known))


def encoded(folder: Path, text: str) -> list[int]:
    encode = encoder(find_tokenizer(folder), chat=True)
    assert encode is not None
    return encode(text)


def words(model: Path, prompts: Path) -> list[str]:
    small = ["--queue-size", "4", "--batch-size", "2", "--output-tokens", "3", "--trials", "1"]
    return ["--model", str(model), "--prompts", str(prompts), *small, "--quiet"]


def test_a_prompt_is_a_message_of_the_user_in_the_template(chatty: Path) -> None:
    whole = AutoTokenizer.from_pretrained(chatty)
    tokenizer = find_tokenizer(chatty)
    assert tokenizer is not None
    for text in PROMPTS:
        message = [{"role": "user", "content": text}]
        ids = encoded(chatty, text)
        assert tokenizer.decode(ids) == f"<|endoftext|>user: {text}\nassistant: "
        said = whole.apply_chat_template(message, add_generation_prompt=True)
        assert ids == list(said["input_ids"])


def test_the_same_model_in_a_gguf_file_has_the_same_messages(
    chatty: Path, tmp_path: Path, make_model: MakeModel
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, make_model(LLAMA), tokenizer=chatty / "tokenizer.json", template=TEMPLATE)
    for text in PROMPTS:
        assert encoded(file, text) == encoded(chatty, text)


def test_prompts_stay_as_they_are_without_the_option(
    chatty: Path, prompts: Path, program: Program
) -> None:
    assert program("run", *words(chatty, prompts), "--output", "raw").code == 0
    said = program("run", *words(chatty, prompts), "--chat-template", "--output", "chat")
    assert said.code == 0, said.err
    raw, chat = (json.loads(Path(name, "result.json").read_text()) for name in ("raw", "chat"))
    assert [row["prompt"] for row in raw["outputs"]] == [*PROMPTS, *PROMPTS]
    wrapped = [f"<|endoftext|>user: {text}\nassistant: " for text in PROMPTS]
    assert [row["prompt"] for row in chat["outputs"]] == [*wrapped, *wrapped]
    assert "chat_template" not in raw["config"]["workload"]  # earlier versions then read it
    assert raw["workload"]["name"].endswith("prompts.txt")
    assert chat["config"]["workload"]["chat_template"] is True
    assert chat["workload"]["name"].endswith("prompts from prompts.txt in the chat template")
    assert "--chat-template" in chat["command"]
    assert program("reproduce", "chat", "--output", "again").code == 0


def test_a_workload_with_the_template_can_be_saved(
    chatty: Path, prompts: Path, program: Program
) -> None:
    asked = ["--model", str(chatty), "--prompts", str(prompts), "--chat-template"]
    assert program("workload", "save", "saved.jsonl", *asked).code == 0
    ids = [
        json.loads(line).get("prompt_ids") for line in Path("saved.jsonl").read_text().splitlines()
    ]
    assert encoded(chatty, PROMPTS[0]) in ids


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_template_is_a_usage_error(
    template: str | None, chatty: Path, prompts: Path, program: Program
) -> None:
    set_template(chatty, template)
    said = program("run", *words(chatty, prompts), "--chat-template", "--output", "out")
    assert (said.code, Path("out").exists()) == (2, False)
    assert "--chat-template: this model's tokenizer has no template; drop the option" in said.error


def test_a_model_without_a_tokenizer_is_a_usage_error(prompts: Path, program: Program) -> None:
    said = program("run", *words(Path("toy-gpt2"), prompts), "--chat-template", "--output", "out")
    assert said.code == 2
    assert "--chat-template: no tokenizer is known" in said.error


@pytest.mark.parametrize(
    "more", [{}, {"prompt_tokens": "7"}, {"trace": Path(__file__)}], ids=["none", "random", "trace"]
)
def test_the_template_needs_prompts_of_text(more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--chat-template: needs prompts as text; give --prompts"):
        WorkloadSpec(chat_template=True, **more)


HOSTILE = {
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__']['open']('ran', 'w') }}",
    "changes": "{{ messages.append(1) }}",
    "own error": "{{ raise_exception('no\nroles') }}",
    "syntax": "{% for %}",
    "missing": "{{ messages[3].content.strip() }}",
    "endless": "{% for i in range(10 ** 12) %}{{ i }}{% endfor %}",
    "zero": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_runs_nothing_and_is_a_usage_error(
    name: str, chatty: Path, prompts: Path, program: Program
) -> None:
    set_template(chatty, HOSTILE[name])
    said = program("run", *words(chatty, prompts), "--chat-template", "--output", "out")
    assert (said.code, Path("out").exists(), Path("ran").exists()) == (2, False, False)
    assert "--chat-template: the tokenizer's template fails: " in said.error


def test_a_template_that_leaves_the_prompt_out_still_makes_one(
    chatty: Path, prompts: Path, program: Program
) -> None:
    set_template(chatty, "{% for message in messages %}{% endfor %}")
    said = program("run", *words(chatty, prompts), "--chat-template", "--output", "out")
    assert said.code == 2
    assert "has no tokens" in said.error


# Servers


def test_a_server_gets_the_message_as_ids(
    chatty: Path, prompts: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = wired(monkeypatch, manner=Manner("vllm"))
    asked = ["--target", URL, "--tokenizer", str(chatty), "--prompts", str(prompts)]
    small = ["--queue-size", "4", "--batch-size", "2", "--output-tokens", "3", "--trials", "1"]
    said = program("run", *asked, *small, "--chat-template", "--quiet", "--output", "out")
    assert said.code == 0, said.err
    assert encoded(chatty, PROMPTS[0]) in [body["prompt"] for body in network.bodies]


def test_a_server_that_applies_its_own_template_gets_none_of_ours(
    chatty: Path, prompts: Path, program: Program
) -> None:
    asked = ["--target", "http://127.0.0.1:9", "--tokenizer", str(chatty), "--endpoint", CHAT]
    said = program("run", *asked, "--prompts", str(prompts), "--chat-template", "--output", "out")
    assert said.code == 2
    assert f"--chat-template: the server applies its own at {CHAT}" in said.error


def test_a_server_may_have_the_tokenizer_of_a_gguf_file(
    chatty: Path,
    tmp_path: Path,
    make_model: MakeModel,
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, make_model(LLAMA), tokenizer=chatty / "tokenizer.json")
    network = wired(monkeypatch, manner=Manner("vllm"))
    asked = ["--target", URL, "--tokenizer", str(file), "--queue-size", "4", "--batch-size", "2"]
    said = program(
        "run", *asked, "--output-tokens", "3", "--trials", "1", "--quiet", "--output", "out"
    )
    assert said.code == 0, said.err
    tokenizer = find_tokenizer(chatty)
    assert tokenizer is not None
    classic = tokenizer.encode("The quick brown fox jumped over the")
    assert network.bodies[-1]["prompt"] == classic
