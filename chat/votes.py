"""Votes and who meets whom: facts in rows, everything else computed from them."""

from __future__ import annotations

import random

from .database import Database
from .errors import ChatError


async def draw(database: Database, models: list[str], dice: random.Random | None = None) -> tuple[str, str]:
    """Two different models for a blind battle, sides shuffled. Raises `invalid` when there are not two."""
    if len(models) < 2:
        raise ChatError("invalid", "A blind battle needs two models on offer.", fields={"mode": "needs two models"})
    a, b = (dice or random.SystemRandom()).sample(models, 2)
    return a, b
