"""The README's pictures: the pages of a running service as Chromium shows them. Votes on the leaderboard are made up.

`scripts/pictures` runs this.
"""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.browser import chromium
from tests.harness.service import Service

HERE = Path(__file__).resolve().parent

STRENGTHS = {
    "Amber Owl": 1.1, "Blue Heron": 0.8, "Demo Scholar": 0.3, "Demo Poet": 0.2, "Grey Fox": -0.4, "Red Kite": -0.9,
}  # fmt: skip
MODELS = [
    {"id": name.lower().replace(" ", "-"), "provider": "demo", "vendor": "Parley", "display_name": name,
     "personality": "poet" if "o" in name.split()[1] else "scholar", "pace": 0.002}
    for name in STRENGTHS
]  # fmt: skip


def vote(path: Path) -> None:
    """Make up a few hundred votes, won by the stronger model more often, and some that were not counted."""
    dice, now = random.Random(7), int(time.time() * 1000)
    rows = []
    for n in range(640):
        a, b = dice.sample(list(STRENGTHS), 2)
        won = dice.random() < 1 / (1 + 2.718 ** (STRENGTHS[b] - STRENGTHS[a]))
        preference = dice.choices(["tie", "both_bad", "model_a" if won else "model_b"], [12, 5, 83])[0]
        reason = "revealed" if dice.random() < 0.06 else "named" if dice.random() < 0.02 else None
        ids = [name.lower().replace(" ", "-") for name in (a, b)]
        facts = (preference, int(reason is None), reason, now - n * 600_000)
        rows.append((f"v{n}", f"t{n}", f"s{n}", "someone", "random", *ids, *facts))
    with sqlite3.connect(path) as database:
        columns = "id, turn_id, session_id, account_id, mode, model_a, model_b, preference, counted, reason, created_at"
        database.executemany(f"INSERT INTO votes ({columns}) VALUES ({', '.join('?' * 11)})", rows)


async def ended(page: Any, replies: int) -> None:
    """Wait until so many answers have ended and are drawn."""
    check = f"""() => {{ const {{list, running, frame}} = document.querySelector('parley-chat');
        return list.filter(({{role}}) => role === 'assistant').length >= {replies} && !running && !frame; }}"""
    while not await page.evaluate(check):
        await asyncio.sleep(0.05)


async def ask(page: Any, text: str, replies: int) -> None:
    await page.locator("parley-chat textarea").fill(text)
    await page.keyboard.press("Enter")
    await ended(page, replies)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parley.db"
        environment = {"DATABASE_URL": f"sqlite:///{path}", "PARLEY_MODELS": json.dumps(MODELS)}
        environment |= {"PARLEY_DRAW_SEED": "3"}
        async with Service(environment, server="serve") as service, chromium() as browser:
            vote(path)

            async def page(address: str, width: int, height: int, scheme: str) -> Any:
                context = await browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                opened = await context.new_page()
                await opened.goto(service.url.replace("127.0.0.1", "localhost") + address)
                await opened.wait_for_load_state("networkidle")
                return opened

            async def keep(opened: Any, name: str, **how: Any) -> None:
                await opened.screenshot(path=HERE / f"{name}.png", animations="disabled", caret="hide", **how)

            home = await page("/", 1280, 820, "light")
            await ask(home, "Compare a violin and a cello in a table", 1)
            await keep(home, "home")
            arena = await page("/arena", 1280, 880, "dark")
            await ask(arena, "Is a hot dog a sandwich?", 2)
            await keep(arena, "arena")
            await keep(await page("/leaderboard", 1180, 900, "light"), "leaderboard", full_page=True)
            phone = await page("/arena", 390, 780, "light")
            await ask(phone, "Hello", 2)
            await keep(phone, "phone")
            events = await page("/debug", 1280, 760, "light")
            await events.get_by_role("button", name="Send").click()
            await events.get_by_text("turn_complete").wait_for()
            await keep(events, "events")
            shared = await share(home)
            reader = await page(shared, 1280, 820, "dark")
            await ended(reader, 1)
            await keep(reader, "shared")


async def share(page: Any) -> str:
    """The address under which others can read what was said on this page."""
    script = """async () => { const chat = document.querySelector('parley-chat');
        return (await chat.api(`sessions/${chat.id}/share/`, {})).share_url; }"""
    address: str = await page.evaluate(script)
    return address


asyncio.run(main())
