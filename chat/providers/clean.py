"""A provider's text as every storage and every reader can hold it."""

from __future__ import annotations

import re

UNFIT = re.compile("[\0\ud800-\udfff]")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Cleaner:
    """The text of one answer, piece by piece.

    Vendors cut an emoji in two: its halves (surrogates) come in two deltas and are joined here. NUL, which PostgreSQL
    does not store, and a half that stays alone, which UTF-8 cannot say, become U+FFFD.
    """

    def __init__(self) -> None:
        self._half = ""  # a first half at the end of the last piece

    def feed(self, text: str) -> str:
        """Return what can be shown by now: a first half at the end waits for the next piece."""
        if not self._half and not UNFIT.search(text):
            return text
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return clean(text)

    def end(self) -> str:
        """Return what was still waiting."""
        half, self._half = self._half, ""
        return clean(half)


def clean(text: str) -> str:
    """Return a whole text with its halves joined and U+FFFD for what cannot be stored."""
    if UNFIT.search(text):  # joining halves costs more than all else done with a token here
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", REPLACEMENT)
    return text
