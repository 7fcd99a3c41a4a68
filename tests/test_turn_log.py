"""A turn log by itself: what it takes from storage where the events are lost, it never takes in their place."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from chat.live.events import Entry, TurnLog, completed, created

SIDES = ("a", "b")
USER = {"id": "user", "role": "user", "participant": None, "content": "hi", "status": "success", "failure_reason": None}


def reply(side: str, content: str, status: str) -> dict[str, Any]:
    named = {"id": f"reply-{side}", "role": "assistant", "participant": side, "content": content, "status": status}
    return named | {"failure_reason": None}


@st.composite
def battles(draw: st.DrawFn) -> list[Entry]:
    """The log of a turn with two replies as its writer numbers it: beginnings, chunks and endings as they come, end."""
    entries = [Entry(0, 0, "created", "", "user", "", created(USER))]
    entries += [Entry(n, n, "created", s, f"reply-{s}", "", created(reply(s, "", "pending"))) for n, s in enumerate(SIDES, 1)]
    said, open_ = dict.fromkeys(SIDES, ""), list(SIDES)
    for ends, side in draw(st.lists(st.tuples(st.booleans(), st.sampled_from(SIDES)), max_size=12)) + [(True, s) for s in SIDES]:
        number = len(entries)
        if side not in open_:
            continue
        if ends:
            open_.remove(side)
            body = completed(reply(side, said[side], "success"))
            entries.append(Entry(number, number, "complete", side, f"reply-{side}", "", body))
        else:
            text = f"{side}{number} "
            said[side] += text
            entries.append(Entry(number, number, "chunk", side, f"reply-{side}", text))
    return [*entries, Entry(len(entries), len(entries), "end")]


def text_at(entries: list[Entry], seq: int, side: str) -> str:
    return "".join(e.text for e in entries if e.seq <= seq and e.kind == "chunk" and e.participant == side)


@given(battles(), st.data())
def test_what_storage_knows_takes_no_number_of_what_comes(entries: list[Entry], data: st.DataObject) -> None:
    """A reply's end is stored before it is told. A log that learns of it from there goes on with all that is said."""
    place = st.integers(2, len(entries) - 1)
    seqs, messages = {"user": -1}, [USER]
    checkpoint = data.draw(place, "all that runs was written down at")
    later = data.draw(st.integers(checkpoint, len(entries) - 1), "endings were written down until")
    for side in SIDES:  # an ending is written down on its own, before it is told: at any moment after its last word
        ending = next(n for n, e in enumerate(entries) if (e.kind, e.participant) == ("complete", side))
        spoken = max((n for n, e in enumerate(entries) if (e.kind, e.participant) == ("chunk", side)), default=2)
        over = later >= ending or (later >= spoken and data.draw(st.booleans(), f"{side} is over"))
        seq = data.draw(st.integers(spoken, ending - 1), f"{side} ended at") if over else checkpoint
        content = "".join(e.text for e in entries[: seq + 1] if e.participant == side)
        messages.append(reply(side, content, "success" if over else "streaming"))
        seqs[f"reply-{side}"] = seq
    log = TurnLog("turn")
    log.append(entries[: data.draw(st.integers(0, len(entries) - 1), "heard so far")])
    before = log.last
    anyway = data.draw(st.booleans(), "no other moment will be written down")
    if not log.catch_up(messages, seqs, None, anyway=anyway):
        assert not anyway and log.last == before
    log.show()
    assert log.last <= max(before, *seqs.values())
    for seq in range(before + 1, log.last + 1):  # whoever comes back with a cursor that is served has just that text
        if log.serves(seq):
            assert [text_at(log.entries, seq, side) for side in SIDES] == [text_at(entries, seq, side) for side in SIDES]
    assert log.append(entries)
    log.show()
    assert log.closed
    for side in SIDES:
        told = "".join(e.text for e in log.entries if e.kind == "chunk" and e.participant == side)
        assert told == log.text(f"reply-{side}") == "".join(e.text for e in entries if e.participant == side)
        assert [e.kind for e in log.entries if e.participant == side].count("complete") == 1


@given(battles(), st.data())
def test_a_turn_that_is_over_is_told_to_its_end(entries: list[Entry], data: st.DataObject) -> None:
    """Each reply's end has the number its writer gave it: who comes back from before it is told, and nobody else."""
    log, end = TurnLog("turn"), len(entries) - 1
    whole = {s: text_at(entries, end, s) for s in SIDES}
    endings = {f"reply-{e.participant}": e.seq for e in entries if e.kind == "complete"}
    log.append(entries[: data.draw(st.integers(0, end), "heard so far")])
    assert log.catch_up([USER, *(reply(s, whole[s], "success") for s in SIDES)], {"user": -1} | endings, end)
    log.show()
    assert log.closed and log.last == end
    assert [log.text(f"reply-{s}") for s in SIDES] == [whole[s] for s in SIDES]
    assert {e.message_id: e.seq for e in log.entries if e.kind == "complete"} == endings
