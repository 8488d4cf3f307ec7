"""Addresses of servers: what is accepted, what each refusal says, and keys that stay hidden."""

from __future__ import annotations

import pickle
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchbench.batching.remote.exchange import Address, Failure, FailureKind
from batchbench.errors import UsageError


@pytest.mark.parametrize(
    ("url", "text", "authority"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://localhost", "http://localhost", "localhost"),
        ("https://example.org:443/", "https://example.org", "example.org"),
        ("http://example.org:443", "http://example.org:443", "example.org:443"),
        ("http://[::1]:8080/v1", "http://[::1]:8080", "[::1]:8080"),
        ("https://Example.ORG/api/v1/", "https://example.org/api", "example.org"),
        ("HTTP://host:1/a/b", "http://host:1/a/b", "host:1"),
        ("http://host/v12", "http://host/v12", "host"),
    ],
)
def test_urls_of_servers(url: str, text: str, authority: str) -> None:
    address = Address.parse(url)
    assert (str(address), address.authority) == (text, authority)
    assert Address.parse(text) == address


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8000", "type --target http://localhost:8000"),
        ("", "type --target http://"),
        ("ftp://host", "begin the URL with http:// or https://"),
        ("http://", "needs a host and a port, such as http://127.0.0.1:8000"),
        ("http://:8000", "needs a host and a port"),
        ("http://host:0", "needs a host and a port"),
        ("http://host:99999", "is not a URL"),
        ("http://host:abc", "is not a URL"),
        ("http://[::1", "is not a URL"),
        ("http://host/v1?x=1", "leave out everything from ? or # on"),
        ("http://host#x", "leave out everything from ? or # on"),
        ("http://me:secret@host", "use --api-key"),
        ("me:secret@host:x", "use --api-key"),
        ("http://ho st", "no spaces"),
        ("http://höst", "only printable ASCII"),
        ("http://host\r\nX: y", "only printable ASCII"),
        ("http://host/v1/chat/completions", "the path with --endpoint"),
        ("http://.host", "is not the name of a host"),
        ("http://a..b", "is not the name of a host"),
        ("http://ho%0d%0ast", "is not the name of a host"),
    ],
)
def test_other_urls_are_refused_in_a_line_that_says_what_to_type(url: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        Address.parse(url)
    assert says in str(raised.value)
    assert str(raised.value).startswith("--target")
    assert "secret" not in str(raised.value)


@given(st.text(st.sampled_from("htp:/[]@#?%. a1ü\r\n\0"), max_size=14))
def test_any_url_is_an_address_or_a_usage_error(url: str) -> None:
    for text in (url, f"http://{url}"):
        with suppress(UsageError):
            address = Address.parse(text)
            line, host, *_ = address.request("/x", None).split(b"\r\n")
            assert line.count(b" ") == 2
            assert host == b"Host: " + address.authority.encode()


def test_a_key_is_sent_and_never_shown() -> None:
    address = Address.parse("http://host", api_key="sk-hidden")
    assert b"\r\nAuthorization: Bearer sk-hidden\r\n" in address.request("/", None)
    assert "sk-hidden" not in f"{address} {address!r}"
    assert "Authorization" not in Address.parse("http://host").headers
    assert pickle.loads(pickle.dumps(address)) == address
    for key in ("sk hidden", "sk-hidden\r\nX: y", "sk-hïdden"):
        with pytest.raises(UsageError) as raised:
            Address.parse("http://host", api_key=key)
        assert str(raised.value).startswith("--api-key: ")
        assert "hidden" not in str(raised.value)


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_a_refusal_that_would_come_again_is_a_usage_error(status: int) -> None:
    assert Failure(FailureKind.STATUS, "", status).is_usage


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
def test_a_server_that_is_busy_or_broken_is_not(status: int) -> None:
    assert not Failure(FailureKind.STATUS, "", status).is_usage


def test_no_message_repeats_what_follows_the_path() -> None:
    for url in ("http://h/v1?key=SECRET", "http://h#SECRET", "h?SECRET", "http://h:x?SECRET"):
        with pytest.raises(UsageError) as error:
            Address.parse(url)
        assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("port", ["abc", "-1", "99999"])
def test_a_wrong_port_is_told_in_our_words(port: str) -> None:
    with pytest.raises(UsageError, match="a port is a number from 1 to 65535"):
        Address.parse(f"http://h:{port}")
