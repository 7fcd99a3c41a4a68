"""Whether a vote tells anything about the models: an answer that names its model was not judged blind. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAKERS = (
    "openai", "chatgpt", "gpt", "anthropic", "claude", "google", "gemini", "gemma", "meta ai", "llama", "mistral",
    "deepseek", "qwen", "alibaba", "xai", "grok", "microsoft", "cohere", "moonshot", "kimi",
)  # fmt: skip
CLAIM = re.compile(
    r"\b(?:i am|i'm|my name is|made by|created by|developed by|trained by|built by|as an? )\b", re.IGNORECASE
)
REACH = 60  # characters behind a claim in which a name belongs to the claim


def names_itself(text: str, names: Iterable[str]) -> bool:
    """Whether an answer says which model it is from or who made it. Errs on the side of not counting.

    names: what the model and its vendor are called, beside the makers everybody knows. The function passes once over
    the claims and once over the names: a single expression for both would look 60 characters ahead from every claim,
    for every name.
    """
    known = sorted({*MAKERS, *(name.lower() for name in names)} - {""})
    claims = [found.end() for found in CLAIM.finditer(text)]
    place = 0
    for name in re.finditer(r"(?<!\w)(?:" + "|".join(map(re.escape, known)) + r")(?!\w)", text, re.IGNORECASE):
        while place < len(claims) and claims[place] <= name.start():
            place += 1
        between = text[claims[place - 1] : name.start()] if place else "\n"
        if len(between) <= REACH and "." not in between and "\n" not in between:
            return True
    return False
