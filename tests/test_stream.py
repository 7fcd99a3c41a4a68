"""One token stream, every reader: whichever worker, whenever it joined, whatever it speaks."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import AsyncExitStack

from tests.conftest import CLOSED, seeded
from tests.harness.api import call, guest, http, messages, new_session, post_turn, stop
from tests.harness.client import SocketReader, SSEReader
from tests.harness.journal import Journal
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service


async def test_seven_readers_on_all_workers_see_the_same_tokens_once(service: Service) -> None:
    """Five sockets and two SSE readers, joining before and during the answer."""
    journal, dice = Journal(), seeded(7)
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    bases = service.urls

    readers = []
    async with asyncio.TaskGroup() as group:
        for n in range(5):
            reader = SocketReader(journal, f"socket{n}", bases[n % len(bases)], session["id"], token=someone.access)
            readers.append(reader)
            group.create_task(_join(reader, dice.uniform(0, 1.0) if n else 0.0))
        await readers[0].event("session_state")
        await readers[0].say("/count 100")
        await readers[0].tokens(1)
        for n in range(2):
            sse = SSEReader(journal, f"sse{n}", bases[n % len(bases)], session["id"], token=someone.access)
            readers.append(sse)
            group.create_task(_join(sse, dice.uniform(0, 1.0)))
    await asyncio.gather(*[reader.replies_ended() for reader in readers])
    expected = " ".join(f"⟨{n}⟩" for n in range(100))
    for reader in readers:
        assert reader.view.texts() == [expected], journal.story()
        await reader.leave()
    assert not journal.violations(), journal.story()
    stored = await messages(service.url, someone.access, session["id"])
    assert [(row["role"], row["status"], row["content"]) for row in stored] == [
        ("user", "success", "/count 100"),
        ("assistant", "success", expected),
    ]


async def _join(reader: SocketReader | SSEReader, after: float) -> None:
    await asyncio.sleep(after)
    await reader.start()


async def test_workers_behind_one_port_are_one_service(
    postgres_server: Postgres, redis_server: Redis
) -> None:
    """A plain `uvicorn --workers 2`: whichever worker a reader lands on, it sees every token once."""
    environment = CLOSED | {"DATABASE_URL": postgres_server.create_database(), "REDIS_URL": redis_server.url}
    journal = Journal()
    async with Service(environment, workers=2, shared_port=True) as service, AsyncExitStack() as stack:
        someone = await guest(service.url)
        session = await new_session(service.url, someone.access)
        readers = [
            await stack.enter_async_context(
                SocketReader(journal, f"socket{n}", service.url, session["id"], token=someone.access)
            )
            for n in range(8)  # all on one worker: once in 128
        ]
        for reader in readers:
            await reader.event("session_state")
        await readers[0].say("/count 50")
        for reader in readers:
            await reader.turn_ended()
            assert reader.view.texts() == [" ".join(f"⟨{n}⟩" for n in range(50))], journal.story()
    assert not journal.violations(), journal.story()


async def test_leaving_does_not_stop_the_answer(service: Service) -> None:
    """The only reader leaves after three tokens; the stored row is the whole answer."""
    journal = Journal()
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    reader = await SSEReader(
        journal, "leaver", service.url, session["id"], token=someone.access, content="/count 40", resume=False
    ).start()
    await reader.tokens(3)
    await reader.leave()
    async with SocketReader(journal, "later", service.urls[-1], session["id"], token=someone.access) as later:
        await later.replies_ended()
        assert later.view.texts() == [" ".join(f"⟨{n}⟩" for n in range(40))], journal.story()


async def test_a_reader_resumes_from_its_cursor_on_another_worker(service: Service) -> None:
    """It gets what it missed, once, and `resumed` says where that starts."""
    journal = Journal()
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    bases = [service.urls[0], service.urls[-1]]
    async with SocketReader(journal, "back", bases, session["id"], token=someone.access) as reader:
        await reader.event("session_state")
        await reader.say("/count 120")
        for n in range(1, 4):
            await reader.tokens(20 * n)
            reader.drop()
            await reader.until(lambda n=n: reader.connections > n, what="a new connection")
        await reader.turn_ended()
        assert reader.view.texts() == [" ".join(f"⟨{n}⟩" for n in range(120))], journal.story()
        resumed = journal.events("back", "resumed")
        assert len(resumed) == 3, journal.story()
    assert not journal.violations(), journal.story()


async def test_an_arena_turn_is_said_side_by_side(service: Service) -> None:
    """Both sides of a compare session, in the arena's own lines."""
    someone = await guest(service.url)
    session = await new_session(
        service.url, someone.access, mode="compare", model_a_id="demo-scholar", model_b_id="demo-poet"
    )
    answer = await post_turn(service.url, someone.access, session["id"], "/count 20", accept="lines")
    expected = " ".join(f"⟨{n}⟩" for n in range(20))
    assert answer.sides() == {"a": expected, "b": expected}
    assert answer.finishes() == {"a": {"finishReason": "stop"}, "b": {"finishReason": "stop"}}


async def test_a_poll_takes_what_there_is_and_ends(service: Service) -> None:
    """`?poll=1`, as ntfy has it: each answer goes on where the last one ended, and the last one says that all is said."""
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    posting = asyncio.create_task(post_turn(service.url, someone.access, session["id"], "/count 100000"))
    path, cursor, text, polls = f"/api/sessions/{session['id']}/stream/", "", "", 0
    async with asyncio.timeout(20):
        while "event: done" not in (answer := await call(
            service.urls[polls % len(service.urls)], "GET", path, someone.access, params={"poll": "1", "after": cursor}
        )).text:
            told = "message_chunk" in answer.text
            polls += told
            if told and polls == 4:
                assert await stop(service.url, someone.access, session["id"])
            for event in [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]:
                text, cursor = text + event.get("chunk", ""), event["cursor"]
    for event in [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {") and line != "data: {}"]:
        text += event.get("chunk", "")
    await posting
    stored = (await messages(service.url, someone.access, session["id"]))[1]
    assert polls >= 4 and text == stored["content"]


async def test_a_worker_that_ends_tells_every_stream_its_end(postgres_server: Postgres, redis_server: Redis) -> None:
    """`serve` cut all streams off five seconds after SIGTERM, in the middle of answers that went on.

    The worker's own answers are told to their ends in every dialect. The readers of another worker's answer are sent
    away: with a sentence, or without a last event where clients come back with their cursor.
    """
    url = postgres_server.create_database()
    environment = CLOSED | {"DATABASE_URL": url, "REDIS_URL": redis_server.url, "PARLEY_DRAIN": "0.3"}
    async with Service(environment, workers=2, server="serve") as service, asyncio.TaskGroup() as group:
        someone, ending = await guest(service.url), service.urls[0]

        async def read(begun: asyncio.Event, method: str, path: str, body: object = None, base: str = ending) -> str:
            said = ""
            async with http(base, someone.access) as client, client.stream(method, path, json=body) as answer:
                async for part in answer.aiter_text():
                    said += part
                    if "⟨1⟩" in said:
                        begun.set()
            return said

        async def follow(method: str, path: str, body: object = None, base: str = ending) -> asyncio.Task[str]:
            """Follow an answer; return once its first tokens have come."""
            begun = asyncio.Event()
            reading = group.create_task(read(begun, method, path, body, base))
            await begun.wait()
            return reading

        async def readers(owner: str, reply: str) -> dict[str, asyncio.Task[str]]:
            """Have a worker answer a message, and follow the answer on the ending worker in every dialect."""
            id = (await new_session(service.url, someone.access))["id"]
            lines = [{"role": "user", "id": f"ask-{reply}", "content": "/count 100000"}, {"role": "assistant", "id": reply}]
            post = "POST", "/api/messages/stream/", {"session_id": id, "messages": lines}
            await follow(*post, owner)
            following = {
                name: await follow("POST", f"{post[1]}?format={name}", post[2]) for name in ("sse", "ndjson", "text", "lines")
            }
            following["chat"] = await follow("GET", f"/api/chat/{id}/stream")
            return following | {"ag-ui": await follow("GET", f"/api/ag-ui?runId={reply}&offset=-1")}

        asked = {"model": "demo-poet", "messages": [{"role": "user", "content": "/count 100000"}]}
        whole = group.create_task(call(ending, "POST", "/v1/chat/completions", someone.access, json=asked))
        streamed = await follow("POST", "/v1/chat/completions", asked | {"stream": True})
        own, others = await readers(ending, "own"), await readers(service.urls[1], "others")
        service.terminate(0)
        assert await service.ended(0, within=10) == -signal.SIGTERM

        async def ends(found: dict[str, asyncio.Task[str]]) -> dict[str, str]:
            return {name: (await reading)[-200:] for name, reading in found.items()}

        interrupted, away = "The answer was interrupted by a restart.", "The service is restarting. Please come back in a moment."
        told = await ends(own)
        assert told["sse"].endswith("event: done\ndata: {}\n\n") and "turn_complete" in told["ndjson"]
        assert interrupted in told["ag-ui"] and interrupted in await streamed
        refused = await whole
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "interrupted")
        left = await ends(others)
        assert "turn_complete" not in left["sse"] + left["ndjson"] and "RUN_" not in left["ag-ui"]
        for found, sentence in ((told, interrupted), (left, away)):
            assert found["text"].endswith(f"\n[{sentence}]\n")
            assert found["lines"].endswith(f'\nad:{{"finishReason": "error", "error": "{sentence}"}}\n')
            assert found["chat"].endswith(f'data: {{"type":"error","errorText":"{sentence}"}}\n\ndata: [DONE]\n\n')
        service.terminate(1)
        await service.ended(1, within=10)
        assert "Traceback" not in service.log()
