"""The table of faults: each ends in its kind and line, and nothing half-received is a success."""

from __future__ import annotations

import json
import re

import pytest
from support.faults import FAULTS, Fault, after, playing
from support.feeds import Fixed

from batchbench.batching.remote.events import Reply, parse
from batchbench.batching.remote.exchange import Address, FailureKind
from batchbench.batching.remote.wire import exchange


def ask(url: str, fault: Fault, requests: int = 1, tokens: int = 5) -> list[Reply]:
    """Return the replies to some requests, one after another."""
    address = Address.parse(url, timeout_s=fault.timeout_s)
    body = json.dumps(
        {"prompt": [1, 2], "max_tokens": tokens, "stream_options": {"include_usage": True}}
    )
    feed = Fixed([body.encode()] * requests, at_once=1)
    return [parse(one, tokens) for one in exchange(address, feed)]


def test_the_table_is_large_and_covers_every_kind() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 24
    missing = {FailureKind.LOCAL}  # not the server's: it has tests of its own
    assert {fault.kind for fault in FAULTS} == set(FailureKind) - missing


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_ends_in_its_kind_and_line(fault: Fault) -> None:
    with playing(fault) as url:
        (reply,) = ask(url, fault)
    assert reply.failure is not None
    assert reply.failure.kind is fault.kind, reply.failure
    assert re.search(fault.line, reply.failure.text), reply.failure.text
    assert reply.failure.text == " ".join(reply.failure.text.split())
    assert len(reply.failure.text) < 300
    assert reply.failure.text[0].islower() or reply.failure.text.startswith("http")
    # A server that says nothing may be busy during a trial; before, it cannot be asked.
    assert reply.failure.is_usage == (fault.exit_code == 2 and fault.where != "silent")


@pytest.mark.parametrize(
    "fault",
    [fault for fault in FAULTS if not (fault.where or fault.tls or fault.scheme == "https")],
    ids=lambda fault: fault.name,
)
def test_a_fault_leaves_the_requests_before_it_whole(fault: Fault) -> None:
    with playing(fault, when=after(2)) as url:
        *good, bad = ask(url, fault, requests=3)
    assert [(reply.failure, reply.output_tokens) for reply in good] == [(None, 5)] * 2
    assert bad.failure is not None
    assert bad.failure.kind is fault.kind
