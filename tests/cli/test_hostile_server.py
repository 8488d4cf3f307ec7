"""Strings of a server are printable wherever they are shown or saved, whatever it sends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.program import Program
from support.program import here as here
from support.program import program as program
from support.schedules import Schedule
from support.servers import MODEL, Manner
from support.streams import SSE_HEAD, chunked, event, response
from support.wired import URL, Wired, wired

from batchbench.batching.remote import dialects
from batchbench.batching.remote.events import Response, parse, response_of
from batchbench.batching.remote.exchange import Exchange, Read

HOSTILE = (
    "\x1b[31mred\x1b[0m",
    "two\nlines\r\n",
    "\x9b31m",
    "\x07\x00\x7f",
    "\u202eturned\u2028",
    "\ud800",
    "[bold]<script>$x$</script>\x1b]8;;http://x\x1b\\",
)

RUN = ("run", "--target", URL, "--batch-size", "2", "--queue-size", "4", "--trials", "1")


def patched(
    patch: pytest.MonkeyPatch,
    change: Callable[[str, str], str],
    manner: Manner | None = None,
) -> Wired:
    """Put a fake server in place of the network, whose pages are changed by path and text."""
    network = wired(patch, Schedule(slots=2), manner)

    def get(address: Any, path: str) -> Response:
        found = network.server.get(address, path)
        body = change(path, found.body.decode()).encode()
        return Response(found.status, found.headers, [(0, body)])

    patch.setattr(dialects, "get", get)
    return network


def check_shown(*texts: str) -> None:
    """Assert that all lines of texts are printable."""
    for line in (line for text in texts for line in text.split("\n")):
        assert line.isprintable(), ascii(line)


def files_in(folder: Path) -> list[str]:
    names = ("*.json", "*.html", "*.csv", "*.svg")
    return [file.read_text("utf-8") for name in names for file in folder.glob(name)]


@pytest.mark.parametrize("hostile", [*HOSTILE, "x" * 300])
@pytest.mark.parametrize("asked", [False, True])
def test_a_model_name_that_cannot_be_shown_is_refused(
    hostile: str, asked: bool, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_json = json.dumps(hostile)
    patched(monkeypatch, lambda path, text: text.replace(json.dumps(MODEL), as_json))
    for command in (RUN, ("probe", URL)):
        said = program(*command, *(("--model", hostile) if asked else ()))
        assert said.code == 2
        assert said.error.startswith("batchbench: --model ")
        assert "start the server with a name for its model" in said.error
        check_shown(said.out, said.err)
    assert not list(Path().glob("*/result.json"))


def test_a_hostile_name_is_not_shown_among_those_of_other_models(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [{"id": name} for name in (*HOSTILE, MODEL)]
    pages = {"/v1/models": json.dumps({"data": names})}
    patched(monkeypatch, lambda path, text: pages.get(path, text), Manner("vllm"))
    said = program(*RUN)
    assert (said.code, "--model: the server has several; name one of" in said.error) == (2, True)
    check_shown(said.out, said.err)
    assert program(*RUN, "--model", MODEL, "--output", "out").code == 0


def test_a_request_has_the_name_as_the_server_spells_it(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "org/Größe [bold]$x$ 模型:q4 <b>" + "x" * 100
    network = patched(
        monkeypatch, lambda path, text: text.replace(json.dumps(MODEL), json.dumps(name))
    )
    said = program(*RUN, "--output", "out")
    assert said.code == 0, said.err
    assert {body["model"] for body in network.bodies} == {name}
    assert name in json.loads(Path("out/result.json").read_text("utf-8"))["model"]["name"]
    assert "<b>xxx" not in Path("out/report.html").read_text("utf-8")


@pytest.mark.parametrize("hostile", [*HOSTILE, "x" * 300])
@pytest.mark.parametrize(
    ("dialect", "path", "field"),
    [("llama.cpp", "/props", "build_info"), ("vllm", "/version", "version")],
)
def test_a_version_is_printable_wherever_it_is_shown(
    dialect: Any,
    path: str,
    field: str,
    hostile: str,
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change(at: str, text: str) -> str:
        if at == "/metrics":
            return f'{hostile.encode(errors="replace").decode()}{{a="\x1b"}} 1\n{text}'
        return json.dumps({**json.loads(text), field: hostile}) if at == path else text

    patched(monkeypatch, change, Manner(dialect))
    for words in ((*RUN, "--output", "out"), ("probe", URL), ("report", "out")):
        said = program(*words)
        assert said.code == 0, said.err
        check_shown(said.out, said.err)
    check_shown(*files_in(Path("out")))


def answers(hostile: str) -> Sequence[bytes]:
    """Return responses with a text in every field that a failure may show."""
    head = hostile.encode(errors="replace").replace(b"\n", b" ").replace(b"\r", b" ")
    head = bytes(byte for byte in head if byte not in b"\0\x7f")
    page = f"<title>{hostile}</title>".encode(errors="replace")
    finish = {"choices": [{"text": " a", "finish_reason": hostile}]}
    moved = b"HTTP/1.1 302 Found\r\nLocation: " + head + b"\r\nContent-Length: 0\r\n\r\n"
    streams = ({"error": {"message": hostile}}, {"choices": hostile}, [hostile], finish)
    return [
        *(response(json.dumps({"error": hostile}).encode(), s) for s in ("400 No", "500 No")),
        *(response(content, "500 No") for content in (page, head, b"{" + head)),
        response(page, kind="text/html"),
        *(SSE_HEAD + chunked(event(data)) + chunked(b"") for data in streams),
        moved,
        b"\x1b[31m" + head,
        b"HTTP/1.1 200 OK\r\n" + head + b": x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: " + head + b"\r\nContent-Length: 1\r\n\r\nx",
    ]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_every_failure_is_one_printable_line(hostile: str) -> None:
    for answer in answers(hostile):
        exchange = Exchange(0, 0, 0, reads=[Read(1, True, 1, answer)], ended_ns=1, closed=True)
        assert response_of(exchange) is not None
        reply = parse(exchange, 3)
        assert reply.failure is not None
        assert reply.failure.text.isprintable(), ascii(reply.failure.text)
        assert (reply.finish_reason or "").isprintable()
