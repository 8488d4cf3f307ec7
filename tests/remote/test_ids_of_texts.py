"""Token ids that a server does not tell: taken from the text, if the text can only have these."""

from __future__ import annotations

from dataclasses import replace

from support.served import served_trial

from batchbench.batching.models.source import Tokenizer
from batchbench.batching.remote.bench import with_ids
from batchbench.batching.remote.outcome import Output
from batchbench.workloads import Workload

PIECES = ("a", "b", "\ufffd", "ab")
"""A vocabulary; two ids may stand for bytes that are no character and look the same."""

LETTERS = Tokenizer(
    encode=lambda text: [PIECES.index(letter) for letter in text],
    decode=lambda ids: "".join(PIECES[i] for i in ids),
    whole=dict,
)


def known_ids(*texts: str, asked: int = 2) -> list[list[int] | None]:
    """Return the ids that are found for outputs of ``asked`` tokens; None if they are not."""
    workload = Workload.of("texts", [[1]] * len(texts), [asked] * len(texts))
    recording = replace(served_trial("continuous", workload=workload), tokens=None)
    found, unknown = with_ids(recording, [Output(None, text) for text in texts], LETTERS)
    return [None if i in unknown else found.tokens_of(i).tolist() for i in range(len(texts))]


def test_a_text_gives_its_ids_if_it_has_as_many_as_the_server_counted() -> None:
    assert known_ids("ab", "ba", "a", "aba") == [[0, 1], [1, 0], None, None]


def test_a_text_with_bytes_that_are_no_character_gives_none() -> None:
    """Else a right output would be called wrong: other ids give the same text."""
    assert known_ids("a\ufffd", "\ufffd\ufffd", "ab") == [None, None, [0, 1]]
