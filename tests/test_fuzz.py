"""A moment of `tests/fuzz.py`, which goes on for as long as one likes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import SEED
from tests.fuzz import ENVIRONMENT, Fuzz
from tests.harness.service import Service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    database = f"sqlite:///{tmp_path_factory.mktemp('fuzz') / 'parley.db'}"
    with Service(ENVIRONMENT | {"DATABASE_URL": database}, server="serve") as running:
        yield running


@pytest.mark.parametrize(("kind", "expected"), [("requests", {"200", "400", "404"}), ("frames", {"1002", "open"})])
async def test_nonsense_breaks_nothing(service: Service, kind: str, expected: set[str]) -> None:
    fuzz = Fuzz(service, SEED)
    assert await fuzz.judged(kind, 3) == []
    assert expected <= fuzz.answers.keys(), "it reached what it is to try"
