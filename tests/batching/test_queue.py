"""The waiting queue behaves as a sorted list does."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.laws import ORDER_KEYS, law

from batchbench.batching.policies import ORDERS
from batchbench.batching.scheduler import WaitingQueue
from batchbench.errors import UsageError
from batchbench.workloads import Request

bounds = st.one_of(st.none(), st.integers(-25, 25))
slices = st.builds(slice, bounds, bounds, st.one_of(st.none(), st.integers(-3, 3).filter(bool)))
operations = st.one_of(
    st.tuples(st.just("push"), st.lists(st.integers(1, 5), max_size=8)),
    st.tuples(st.just("front"), st.integers(1, 10)),
    st.tuples(st.just("some"), st.integers(0, 2**32 - 1)),
)


def requests_of(lengths: list[int], first: int = 0) -> list[Request]:
    """Requests in the order of arrival, the first having index ``first``."""
    return [Request(first + i, 9 - (first + i) % 9, n, 0) for i, n in enumerate(lengths)]


def assert_equal(queue: WaitingQueue, model: list[Request], piece: slice) -> None:
    assert len(queue) == len(model)
    assert bool(queue) == bool(model)
    assert list(queue) == model
    assert queue[piece] == model[piece]
    assert list(reversed(queue)) == model[::-1]
    for at in range(-len(model), len(model)):
        assert queue[at] is model[at]
        assert queue.index(model[at]) == at % len(model)
    if model:
        assert queue.oldest is min(model, key=lambda request: request.index)
    for beyond in (len(model), -len(model) - 1):
        with pytest.raises(IndexError):
            queue[beyond]


@pytest.mark.parametrize("order", list(ORDERS))
@given(script=st.lists(operations, max_size=20), piece=slices)
@law
def test_it_equals_a_sorted_list(
    order: str, script: list[tuple[str, int | list[int]]], piece: slice
) -> None:
    queue, model, pushed = WaitingQueue(order), list[Request](), 0
    for name, value in script:
        if isinstance(value, list):
            arriving = requests_of(value, first=pushed)
            pushed += len(arriving)
            queue.push(arriving)
            model = sorted(model + arriving, key=ORDER_KEYS[order])
        else:
            draw = random.Random(value)
            some = draw.sample(model, draw.randint(0, len(model)))
            leaving = model[:value] if name == "front" else some
            if leaving:
                queue.take(leaving)
            model = [request for request in model if request not in leaving]
        assert_equal(queue, model, piece)


@pytest.mark.parametrize("order", list(ORDERS))
def test_who_does_not_wait_has_no_place(order: str) -> None:
    queue = WaitingQueue(order)
    with pytest.raises(IndexError):
        _ = queue.oldest
    waiting, gone = requests_of([3, 5])
    queue.push([waiting, gone])
    queue.take([gone])
    for stranger in (gone, waiting._replace(index=7)):
        with pytest.raises(ValueError, match="is not in list"):
            queue.index(stranger)
    queue.push([waiting._replace(index=2)])
    for bounds in ((1,), (0, 0)):
        with pytest.raises(ValueError, match="is not in list"):
            queue.index(queue[0], *bounds)


@pytest.mark.parametrize("order", list(ORDERS))
def test_it_equals_a_sorted_list_also_when_thousands_come_and_go(order: str) -> None:
    draw = random.Random(order)
    queue, model, pushed = WaitingQueue(order), list[Request](), 0
    for _ in range(200):
        arriving = requests_of(draw.choices(range(1, 50), k=draw.choice([1, 5, 200])), pushed)
        pushed += len(arriving)
        queue.push(arriving)
        model = sorted(model + arriving, key=ORDER_KEYS[order])
        count = draw.choice([0, 3, len(model) // 2, len(model)])
        if count and model:
            queue.take(queue[:count])
        model = model[count:]
        assert list(queue) == model
    assert pushed > 5000


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
@law
def test_taking_who_does_not_wait_is_refused_and_changes_nothing(
    lengths: list[int], data: st.DataObject
) -> None:
    queue = WaitingQueue("fifo")
    waiting = requests_of(lengths)
    queue.push(waiting)
    gone = [queue[0]]
    queue.take(gone)
    stranger = Request(99, 3, 1, 0)
    left = list(queue)
    wrong = data.draw(
        st.sampled_from([gone, [stranger], [*left, stranger], [stranger, *left], [*left, *gone]])
    )
    with pytest.raises(UsageError, match="not waiting"):
        queue.take(wrong)
    assert list(queue) == left


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
@law
def test_taking_one_twice_is_refused(lengths: list[int], data: st.DataObject) -> None:
    queue = WaitingQueue("fifo")
    queue.push(requests_of(lengths))
    twice = data.draw(st.sampled_from(list(queue)))
    with pytest.raises(UsageError, match="not waiting"):
        queue.take([*queue, twice])
    with pytest.raises(UsageError, match="not waiting"):
        queue.take([twice, twice])
    assert len(queue) == len(lengths)


class Walked(WaitingQueue):
    """Counts how often all of it is read."""

    walks = 0

    def __iter__(self) -> Iterator[Request]:
        self.walks += 1
        return super().__iter__()


@pytest.mark.parametrize("order", list(ORDERS))
def test_requests_are_shown_and_taken_without_reading_the_whole_queue(order: str) -> None:
    queue = Walked(order)
    queue.push(requests_of([3, 1, 2, 5, 4, 1, 2, 3]))
    for neighbours in (slice(0, 2), slice(2, 4), slice(1, 2)):
        queue.take(queue[neighbours])
    queue.take([queue[0], queue[2]])
    assert queue.walks == 0
