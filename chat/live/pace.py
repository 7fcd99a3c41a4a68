"""The pace of a blind battle: texts in, equal pieces out, whatever the two models do. Pure.

A reader who could see that one side is faster, pauses more, or comes in larger pieces would learn about its model. So
both sides start together, move in the same ticks or not at all, and get pieces of the same size. The last piece of a
side leaves in the same tick as its end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping


def pieces(held: Mapping[str, int], finished: Collection[str], chars: int) -> dict[str, int]:
    """Return how many characters each open side shows in this tick; nothing at all while one of them has to wait.

    held: characters that have come from the model and are not shown yet, for each side that has not ended;
    finished: the sides whose model has stopped; chars: the most characters one side shows in a tick.
    A side whose model goes on keeps one character more than a piece: its last piece must not leave without its end.
    """
    if not all(side in finished or count > chars for side, count in held.items()):
        return {}
    return {side: min(count, chars) for side, count in held.items()}


class Rhythm:
    """When the next tick of a battle is due. Times are seconds of a monotonic clock.

    While both sides are open a tick comes every `tick` seconds or when the slower model allows it. After one side has
    ended, the other keeps the average rhythm both had together: a sudden hurry would name the faster model.
    """

    def __init__(self, tick: float) -> None:
        self._tick = tick
        self._first = self._last = 0.0
        self._count = 0  # ticks in which both sides moved
        self._tail = 0.0  # seconds between two ticks after one side has ended

    def moved(self, now: float) -> None:
        """Both sides, or after one's end the other, have shown a piece."""
        if not self._count:
            self._first = now
        self._last = now
        self._count += 1

    def side_ended(self) -> None:
        """The first side has ended: the rhythm of the rest is fixed now."""
        if not self._tail:
            self._tail = max(self._tick, (self._last - self._first) / max(1, self._count - 1))

    def due(self) -> float:
        """Return the time of the next tick; 0 for at once."""
        return self._last + (self._tail or self._tick) if self._count else 0.0
