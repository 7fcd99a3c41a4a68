"""The widget in a headless Chromium: its size, the first paint of `/`, a token's way to the screen, what answers cost.

`python -m benchmarks.widget` prints one line for each; the machine should have nothing else to do.
"""

from __future__ import annotations

import asyncio
import gzip
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.browser import chromium, website
from tests.harness.service import ROOT, Service

RUNS = 15  # visits of each page, each with an empty cache
BARE = "<!doctype html><html lang=en><meta charset=utf-8><title>Bare</title><body>word"
TOKENS = 5_000
ANSWERS = 50
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
# The time from a socket's frame with text to the frame of the screen that shows it.
WATCH = """() => {
  const chat = document.querySelector('parley-chat'), hear = chat.hear;
  chat.shownAfter = [];
  chat.hear = function (event) {
    const came = performance.now(), shown = () => chat.shownAfter.push(performance.now() - came);
    hear.call(this, event);
    if (event.type === 'message_chunk') requestAnimationFrame(() => setTimeout(shown));
  };
}"""
ANSWERED = """(count) => { const chat = document.querySelector('parley-chat');
  return chat.list.filter(({role}) => role !== 'user').length >= count && !chat.running && !chat.frame; }"""


async def first_paint(browser: Any, address: str) -> float:
    """Return the milliseconds from the navigation's start to the first text on the page."""
    context = await browser.new_context(viewport={"width": 1280, "height": 800})
    page = await context.new_page()
    await page.goto(address)
    while (painted := await page.evaluate(PAINTED)) is None:
        await asyncio.sleep(0.01)
    await context.close()
    return float(painted)


async def ask(page: Any, text: str, answers: int) -> None:
    await page.locator("parley-chat textarea").fill(text)
    await page.keyboard.press("Enter")
    await page.wait_for_function(ANSWERED, arg=answers, polling=20, timeout=120_000)


async def busy(session: Any) -> tuple[float, float]:
    """Return the seconds the page's main thread has worked, and the megabytes its JavaScript holds."""
    await session.send("HeapProfiler.collectGarbage")
    found = {each["name"]: each["value"] for each in (await session.send("Performance.getMetrics"))["metrics"]}
    return found["TaskDuration"], found["JSHeapUsedSize"] / 1e6


async def main() -> None:
    size = len(gzip.compress((ROOT / "widget" / "widget.js").read_bytes(), 9, mtime=0))
    print(f"size: {size} bytes gzipped")
    with tempfile.TemporaryDirectory() as folder:
        environment = {"DATABASE_URL": f"sqlite:///{Path(folder) / 'parley.db'}", "PARLEY_MAX_TOKENS": "100000"}
        async with Service(environment, server="serve") as service, chromium() as browser:
            with website(lambda path: ({}, BARE)) as port:
                pages = {"/": service.url, "a page of one word": f"http://127.0.0.1:{port}/"}
                paints: dict[str, list[float]] = {name: [] for name in pages}
                for _ in range(RUNS):  # in turns: the machine is not equally busy all the time
                    for name, address in pages.items():
                        paints[name].append(await first_paint(browser, address))
            for name, times in paints.items():
                found = f"{statistics.median(times):.0f} ms ({min(times):.0f}–{max(times):.0f}, {RUNS} visits)"
                print(f"first paint of {name}: {found}")
            page = await (await browser.new_context()).new_page()
            await page.goto(service.url)
            session = await page.context.new_cdp_session(page)
            await session.send("Performance.enable")
            await page.wait_for_selector("parley-chat textarea")
            await page.evaluate(WATCH)
            await ask(page, "/count 200 50", 1)
            shown = await page.evaluate("document.querySelector('parley-chat').shownAfter")
            print(f"a frame is on the screen after: {statistics.median(shown):.1f} ms (median of {len(shown)})")
            before, _ = await busy(session)
            await ask(page, f"/count {TOKENS} 1000", 2)
            print(f"main thread, {TOKENS} tokens in 5 s: {(await busy(session))[0] - before:.2f} s")
            _, least = await busy(session)
            for n in range(ANSWERS):
                await ask(page, "Compare a violin and a cello in a table", n + 3)
            print(f"memory, {ANSWERS} answers later: {(await busy(session))[1] - least:+.1f} MB")


if __name__ == "__main__":
    asyncio.run(main())
