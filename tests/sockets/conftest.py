"""The services sockets are opened on, each shared by a file's tests.

The first kind is Parley's own start on SQLite, the second a plain uvicorn: two workers on PostgreSQL and Redis. In the
one events leave as finished frames, in the other through ASGI.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import STORES, store
from tests.harness.journal import Journal
from tests.harness.service import Service

from . import ENVIRONMENT, UVICORN
from .events import odd


@pytest.fixture(scope="module", params=STORES)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = ENVIRONMENT | store(request.param, request, tmp_path_factory.mktemp("service"))
    if request.param == "sqlite":
        running = Service(environment, server="serve")
    else:
        running = Service(environment, workers=2, options=UVICORN)
    with running:
        yield running
        log = running.log()
    assert "Traceback" not in log, traceback_in(log)


@pytest.fixture(scope="module", params=STORES)
def strict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """In production behind one proxy, with room for few, who have time to say who they are."""
    environment = ENVIRONMENT | store(request.param, request, tmp_path_factory.mktemp("strict"))
    environment |= {
        "PARLEY_ENV": "production",
        "PARLEY_TOKEN_IN_QUERY": "false",
        "PARLEY_TRUSTED_PROXIES": "1",
        "PARLEY_AUTH_TIMEOUT": "20",
        "ALLOWED_HOSTS": "chat.example,*.parley.example,127.0.0.1",
        "PARLEY_SOCKETS_PER_SESSION": "2",
        "PARLEY_SOCKETS_PER_ACCOUNT": "3",
        "PARLEY_SOCKETS_PER_ADDRESS": "4",
    }
    with Service(environment, workers=1 if request.param == "sqlite" else 2, options=UVICORN) as running:
        yield running


@pytest.fixture
def journal() -> Iterator[Journal]:
    """What the readers of a test saw. Whatever the test is about, it was in order and in the contract's words."""
    journal = Journal()
    yield journal
    assert not journal.violations(), journal.story()
    assert not (found := [(event, problem) for event in journal.events() if (problem := odd(event))]), found[:3]


def traceback_in(log: str) -> str:
    """The first traceback of a log and what stands around it."""
    start = log.find("Traceback")
    return log[max(0, start - 500) : start + 6000]
