"""Faults nobody thought of together: a few seeds of random ones, then quiet, then every invariant; and a soak.

`scripts/test --all` runs this file. More seeds, one again, or one seen from the inside:

    python -m tests.harness.chaos --seed 100 --count 50 --stories /tmp
    python -m tests.harness.chaos --seed 7 --seconds 12

A failure prints its seed and the story. The same seed draws the same turns, readers and faults; how the machine
interleaves them it does not decide, so a rare failure may need a few runs.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from tests.harness.chaos import World, chaos, world

SECONDS = 12.0
SOAK = float(os.environ.get("PARLEY_TEST_SOAK", "60"))  # seconds; 600 before a release


@pytest.fixture(params=["postgres", "sqlite"])
async def here(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with world(request.param) as world_of_its_own:
        yield world_of_its_own


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_random_faults(here: World, seed: int) -> None:
    """Two workers on Redis and either storage; kills, freezes, restarts and cuts of all of them, drawn from the seed."""
    report = await chaos(here, seed, SECONDS)
    print(report)
    assert not report.violations, report.story()
    assert report.counts["turns"] and report.counts["faults"]


@pytest.mark.slow
async def test_a_soak(here: World) -> None:
    """Two hundred readers in ten sessions, a fault every few seconds: everything is right, and everything given back."""
    report = await chaos(here, 1000, SOAK, sessions=10, readers=20, every=(3.0, 10.0), rest=(1.0, 10.0), chunks=False)
    print(report)
    assert not report.violations, report.story()
    assert report.counts["readers"] >= 200
