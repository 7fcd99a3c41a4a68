"""The pairing of models for blind battles: drawn by need and doubt, never a model that is failing. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from itertools import combinations

from ..errors import ChatError
from .ratings import Rating


def draw(models: list[str], outages: Iterable[str], ratings: Iterable[Rating], dice: random.Random) -> tuple[str, str]:
    """Two different models for a blind battle, none that is failing. Raises `invalid` when there are not two."""
    if len(models) < 2:
        raise ChatError("invalid", "A blind battle needs two models on offer.", fields={"mode": "needs two models"})
    well = [model for model in models if model not in set(outages)]
    return pick(well if len(well) > 1 else models, {each.model: each for each in ratings}, dice)


def pick(models: list[str], rated: Mapping[str, Rating], dice: random.Random) -> tuple[str, str]:
    """A pair of models, their sides shuffled after the draw.

    A model's weight falls with its battles (1/√(1 + n)), so that new ones are learned about; a pair whose intervals
    overlap, or are unknown, counts double: that is where a vote decides something.
    """
    pairs = list(combinations(sorted(models), 2))
    weights = [_need(rated.get(a)) * _need(rated.get(b)) * _doubt(rated.get(a), rated.get(b)) for a, b in pairs]
    pair = list(dice.choices(pairs, weights)[0])
    dice.shuffle(pair)
    return pair[0], pair[1]


def _need(rating: Rating | None) -> float:
    return float((1 + (rating.battles if rating is not None else 0)) ** -0.5)


def _doubt(a: Rating | None, b: Rating | None) -> float:
    if a is None or b is None or a.lower is None or b.lower is None or a.upper is None or b.upper is None:
        return 2.0
    return 2.0 if a.lower <= b.upper and b.lower <= a.upper else 1.0
