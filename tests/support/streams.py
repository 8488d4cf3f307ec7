"""Bytes of servers' responses, in the dialects of llama.cpp, vLLM and OpenAI."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

DialectName = Literal["llama.cpp", "vllm", "openai"]

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)


def chunked(data: bytes) -> bytes:
    """Return one chunk of a chunked body; of no data, the last one."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(data: object) -> bytes:
    """Return a server-sent event: of JSON, or of the text itself."""
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()


def response(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    """Return a whole response of known length."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def text_of(token: int) -> str:
    """Return the text of a token of the fakes."""
    return f" t{token}"


@dataclass(frozen=True)
class Asked:
    """A request's body, as a server understands it."""

    prompt: Sequence[int]
    output_tokens: int
    chat: bool
    with_ids: bool
    with_usage: bool

    @classmethod
    def of(cls, path: str, body: bytes | None) -> Asked:
        data: Mapping[str, Any] = json.loads(body or b"{}")
        prompt = data.get("prompt", data.get("messages", ""))
        if not (isinstance(prompt, list) and all(isinstance(i, int) for i in prompt)):
            prompt = list(json.dumps(prompt).encode())
        limits = ("max_tokens", "max_completion_tokens", "n_predict")
        return cls(
            prompt,
            next((int(data[name]) for name in limits if name in data), 16),
            "/chat/" in path,
            bool(data.get("return_token_ids") or data.get("logprobs")),
            bool((data.get("stream_options") or {}).get("include_usage")),
        )


@dataclass
class Writer:
    """Writes the events of one response.

    ``per_chunk`` tokens share an event; ``usage_alone`` puts the usage in an event of its own, and
    None does what the dialect does.
    """

    dialect: DialectName
    asked: Asked
    per_chunk: int = 1
    usage_alone: bool | None = None
    cached_tokens: int = 0
    _held: list[int] = field(default_factory=list)
    _sent: int = 0

    def begins(self) -> bytes:
        """Return the head, and of a chat the chunk with the role."""
        role = self._chunk({"delta": {"role": "assistant", "content": ""}})
        return SSE_HEAD + (chunked(event(role)) if self.asked.chat else b"")

    def token(self, token: int, last: bool) -> bytes:
        """Return what is sent when a token is ready."""
        self._held.append(token)
        out = b""
        if len(self._held) >= self.per_chunk or last:
            ends = last and self.dialect != "llama.cpp"
            out = chunked(event(self._output(self._held, "length" if ends else None)))
            self._sent += len(self._held)
            self._held = []
        return out + (self._ends() if last else b"")

    def _output(self, tokens: Sequence[int], finish: str | None) -> dict[str, Any]:
        text = "".join(map(text_of, tokens))
        choice: dict[str, Any] = {"delta": {"content": text}} if self.asked.chat else {"text": text}
        choice["finish_reason"] = finish
        if self.asked.with_ids and self.dialect == "vllm":
            choice["token_ids"] = list(tokens)
        if self.asked.with_ids and self.dialect == "llama.cpp":
            choice["logprobs"] = {"content": [{"id": i, "token": text_of(i)} for i in tokens]}
        return self._chunk(choice)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return {"id": "cmpl-1", "object": kind, "choices": [{"index": 0, **choice}]}

    def _ends(self) -> bytes:
        usage = {
            "prompt_tokens": len(self.asked.prompt),
            "completion_tokens": self._sent,
            "total_tokens": len(self.asked.prompt) + self._sent,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        llama = self.dialect == "llama.cpp"
        alone = self.usage_alone
        if alone is None:
            alone = not llama or self.asked.chat
        told = llama or self.asked.with_usage
        out = b""
        if llama or (told and not alone):
            empty: dict[str, Any] = {"delta": {}} if self.asked.chat else {"text": ""}
            final = self._chunk({**empty, "finish_reason": "length"})
            out += chunked(event({**final, "usage": usage} if told and not alone else final))
        if told and alone:
            out += chunked(event({**self._chunk({}), "choices": [], "usage": usage}))
        return out + chunked(event("[DONE]")) + chunked(b"")
