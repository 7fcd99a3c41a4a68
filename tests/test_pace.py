"""The pace of a blind battle by itself: equal pieces, in step, to the end, whatever the two models do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chat.live.pace import Rhythm, pieces

CHARS = 24
# What happens between two ticks: text of one side arrives (side, characters), or its model stops (side, 0).
arrivals = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 120)), max_size=40)


@given(arrivals)
def test_both_sides_move_in_equal_pieces_to_the_end(news: list[tuple[str, int]]) -> None:
    held, total, finished = {"a": 0, "b": 0}, {"a": 0, "b": 0}, set[str]()
    shown: dict[str, list[int]] = {"a": [], "b": []}
    for side, count in [*news, ("a", 0), ("b", 0)]:
        if count == 0:
            finished.add(side)
        elif side not in finished:
            held[side] += count
            total[side] += count
        while moves := pieces(held, finished, CHARS):
            assert moves.keys() == held.keys(), "an open side moves in every tick"
            for each, moved in moves.items():
                held[each] -= moved
                shown[each].append(moved)
                assert moved == CHARS or (each in finished and held[each] == 0), "only a last piece is shorter"
            for each in [each for each in moves if each in finished and held[each] == 0]:
                del held[each]
    assert not held and {side: sum(counts) for side, counts in shown.items()} == total
    together = min(len(shown["a"]), len(shown["b"])) - 1
    assert shown["a"][:together] == shown["b"][:together]


@given(st.integers(0, 200), st.integers(0, 200), st.sets(st.sampled_from("ab")))
def test_a_model_that_goes_on_keeps_its_last_piece(a: int, b: int, finished: set[str]) -> None:
    moves = pieces({"a": a, "b": b}, finished, CHARS)
    waits = any(count <= CHARS and side not in finished for side, count in (("a", a), ("b", b)))
    assert (moves == {}) == waits


def test_the_tail_keeps_the_rhythm_both_sides_had() -> None:
    rhythm = Rhythm(0.05)
    assert rhythm.due() == 0.0
    for tick in range(11):
        rhythm.moved(100.0 + tick * 0.2)
    assert rhythm.due() == 102.05
    rhythm.side_ended()
    assert abs(rhythm.due() - 102.2) < 1e-9
    rhythm.moved(110.0)
    rhythm.side_ended()
    assert abs(rhythm.due() - 110.2) < 1e-9, "fixed when the first side ended"
