"""Settings of a server that is measured over HTTP. Nothing here opens a socket."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from batchbench import settings
from batchbench.batching.remote.exchange import Address
from batchbench.errors import UsageError, shown
from batchbench.json_file import parse_json
from batchbench.settings import setting

SERVED_MODEL = "auto"
"""Value of ``--model`` with a target: the model that the server has, if it has exactly one."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

API_KEY = "OPENAI_API_KEY"

SETUP_S = 20.0
"""Longest wait for an answer before the trials, when no request can wait for another."""

_PANEL = "Server"

_OWN_FIELDS = (
    *("model", "prompt", "messages", "stream", "stream_options", "n", "best_of"),
    *("max_tokens", "max_completion_tokens"),
)
"""Fields of a request that batchbench sets, so that ``--extra-body`` cannot."""

_SECRET = re.compile(r"(?<!cache_)key|token|secret|password|authorization", re.IGNORECASE)
"""Names of fields that may hold a secret; OpenAI's ``prompt_cache_key`` is none."""


def _secret(value: object, name: str = "") -> str | None:
    """Return the name of the first field that may hold a secret, at any depth.

    A number of tokens and token ids are none.
    """
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else ((name, item) for item in value)
        return next((found for at, item in pairs if (found := _secret(item, at))), None)
    holds = isinstance(value, str) or (type(value) in (int, float) and "token" not in name.lower())
    return name if holds and _SECRET.search(name) else None


OWN_ENGINE = (
    *("engine", "prefill", "max_batched_tokens", "execution", "max_wait", "order"),
    *("load_format", "revision", "dtype", "device", "threads"),
)
"""Settings of our own scheduler, engine and model."""


def refuse_own(*layers: Mapping[str, Any]) -> None:
    """Raise UsageError if settings by field name have both a target and our own engine's."""
    given = {name for layer in layers for name in layer}
    own = [settings.option_name(name) for name in OWN_ENGINE if name in given]
    if own and any(layer.get("target") for layer in layers):
        raise UsageError(
            f"{own[0]}: is for our own engine, but --target measures a server; drop one of them"
        )


def with_served_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by field name; with a target, the model is the server's unless it is set."""
    served = {"model": SERVED_MODEL} if values.get("target") else {}
    return {**served, **values}


@dataclass(frozen=True)
class TargetSpec:
    """The server to measure instead of our own engine; without ``target`` there is none."""

    target: str | None = setting(
        None,
        "Server to measure instead of our own engine, such as http://127.0.0.1:8000; it must have "
        "OpenAI's completions or chat completions API. --model is then the server's name for its "
        "model; leave it out if the server has only one.",
        _PANEL,
        metavar="URL",
        resets=("model",),
    )
    endpoint: str = setting(
        COMPLETIONS,
        f"Endpoint that takes the requests: {COMPLETIONS}, or {CHAT} (needs prompts as text).",
        _PANEL,
        choices=(COMPLETIONS, CHAT),
        metavar="PATH",
    )
    tokenizer: str | None = setting(
        None,
        "Tokenizer of the server's model, to send prompts as text: a model id on the hub, a "
        "local folder or a GGUF file.",
        _PANEL,
        metavar="ID|FOLDER|FILE",
    )
    api_key: str | None = setting(
        None,
        "Key sent as the bearer token. It is not saved or shown. To keep it out of the list of "
        f"processes too, set the environment variable {API_KEY} instead.",
        _PANEL,
        metavar="KEY",
        variable=API_KEY,
    )
    extra_body: str | None = setting(
        None, "JSON object of fields to add to every request.", _PANEL, metavar="JSON"
    )
    timeout: float = setting(
        120.0,
        "Seconds without an answer after which a request counts as failed.",
        _PANEL,
        min=0.001,
        max=1e6,
        unit="seconds",
    )
    clients: int = setting(
        1,
        "Number of client processes that share the requests, on this machine or on the "
        "machines of --executor; only for requests that arrive over time.",
        _PANEL,
        min=1,
        max=1000,
        omit_default=True,
    )
    insecure: bool = setting(False, "Accept any TLS certificate of the server.", _PANEL)
    verify_model: Path | None = setting(
        None,
        "Folder of the model that the server runs; outputs are checked against unbatched "
        "generation with it.",
        _PANEL,
        metavar="FOLDER",
    )

    def __post_init__(self) -> None:
        settings.check(self)
        if self.target is None:
            for field in fields(self):
                if getattr(self, field.name) != field.default and field.name != "api_key":
                    option = settings.option_name(field.name)
                    raise UsageError(f"{option}: is for a server; add --target URL, or drop it")
            return
        _ = self.address, self.extra
        if self.verify_model is None:
            return
        if self.endpoint == CHAT:
            raise UsageError(
                f"--verify-model: {CHAT} puts a template around each prompt, so outputs are not "
                f"those of the bare prompt; give --endpoint {COMPLETIONS}"
            )
        if not self.verify_model.is_dir():
            raise UsageError(
                f"--verify-model {shown(self.verify_model)}: no such folder; give the folder of "
                "the model that the server runs"
            )

    @property
    def address(self) -> Address:
        """The server's address, with the key and the limits of its connections."""
        assert self.target is not None
        return Address.parse(
            self.target, api_key=self.key, timeout_s=self.timeout, insecure=self.insecure
        )

    @property
    def setup_address(self) -> Address:
        """The address for questions before the trials, which a server answers at once."""
        return replace(self.address, timeout_s=min(self.timeout, SETUP_S))

    @property
    def place(self) -> str:
        """Host and port, for titles and names of folders."""
        return str(self.address).partition("://")[2]

    @property
    def key(self) -> str | None:
        """The API key as given, else from the environment."""
        return (self.api_key or os.environ.get(API_KEY) or "").strip() or None

    @property
    def extra(self) -> Mapping[str, Any]:
        """The fields of ``extra_body``."""
        if self.extra_body is None:
            return {}
        place = f"--extra-body {shown(self.extra_body)}"
        if _SECRET.search(self.extra_body):
            place = "--extra-body"  # a message may be logged
        try:
            extra = parse_json(self.extra_body.encode())
        except ValueError as error:
            raise UsageError(f"{place}: is not JSON: {error}") from error
        if not isinstance(extra, dict):
            raise UsageError(f"{place}: must be a JSON object, such as '{{\"top_k\": 1}}'")
        if (name := _secret(extra)) is not None:
            raise UsageError(
                f'{place}: "{shown(name)}" looks like a secret and would be saved in the result; '
                f"use --api-key or {API_KEY}"
            )
        if own := [name for name in _OWN_FIELDS if name in extra]:
            raise UsageError(f"{place}: {own[0]} is set by batchbench; remove it")
        return cast("Mapping[str, Any]", extra)
