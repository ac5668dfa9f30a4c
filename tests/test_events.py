"""Event times against the contract, walked token by token."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vkvtrain.events import events_of, evictions_by, is_due, normalise_chunks, peak_entries


def walk(chunks, length, budget, window):
    """The contract, one token after the other: ((event positions, entries before), most entries ever held)."""
    starts, inside = dict(chunks), {position for start, end in chunks for position in range(start, end)}
    live = position = peak = 0
    events = []
    while position < length:
        if position in starts:
            live, position = live + starts[position] - position, starts[position]
            peak = max(peak, live)
            continue
        assert position not in inside
        live, position = live + 1, position + 1
        peak = max(peak, live)
        if live > budget and live % window == 0:
            events.append((position - 1, live))
            live = budget
    return events, peak


@st.composite
def settings(draw):
    window = draw(st.integers(1, 9))
    budget = window * draw(st.integers(2, 6))
    chunks = [(0, draw(st.integers(1, 90)))]
    for _ in range(draw(st.integers(0, 2))):
        start = chunks[-1][1] + draw(st.integers(0, 30))
        chunks.append((start, start + draw(st.integers(1, 40))))
    return chunks, chunks[-1][1] + draw(st.integers(0, 90)), budget, window


@given(settings())
def test_schedule_is_the_contract(setting):
    events, peak = walk(*setting)
    found = events_of(*setting)
    assert [(event.position, event.live) for event in found] == events
    assert [event.index for event in found] == list(range(len(events)))
    assert evictions_by(*setting) == len(events)
    assert peak_entries(*setting) == peak


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 16), st.integers(2, 6))
def test_after_the_first_event_they_come_every_window(prompt, more, window, times):
    events = events_of(prompt, prompt + more, window * times, window)
    positions = [event.position for event in events]
    assert all(b - a == window for a, b in pairwise(positions))
    assert all(event.live == window * (times + 1) for event in events[1:])
    if events:
        assert positions[0] >= prompt
        assert events[0].live == positions[0] + 1


def test_due():
    assert not is_due(64, budget=64, window=16)
    assert not is_due(79, budget=64, window=16)
    assert is_due(80, budget=64, window=16)
    assert is_due(96, budget=64, window=16)


def test_a_prompt_is_one_chunk():
    assert normalise_chunks(7) == [(0, 7)]
    assert normalise_chunks([(0, 3), (5, 9)], 9) == [(0, 3), (5, 9)]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "start at position 0"),
        ([(1, 3)], "start at position 0"),
        ([(0, 0)], "non-empty"),
        ([(0, 4), (3, 6)], "disjoint"),
        ([(0, 4), (6, 5)], "non-empty"),
        ([(0, 4), (6, 12)], "ends at 12, after its row's 10 tokens"),
        (11, "ends at 11, after its row's 10 tokens"),
    ],
)
def test_chunks_that_do_not_fit(chunks, message):
    with pytest.raises(ValueError, match=message):
        normalise_chunks(chunks, 10)
