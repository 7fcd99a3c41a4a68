"""A real Chromium for tests, and a web server for pages of somebody else."""

from __future__ import annotations

import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.conftest import absent

try:
    from playwright.async_api import async_playwright
except ImportError:
    absent("the browser tests need playwright (tests/requirements.txt)")
# The headless shell is Chromium without the windows that nobody sees here: a page costs a third of the processor.
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    absent("the browser tests need Chromium (apt-get install chromium-headless-shell)")

FLAGS = ["--no-sandbox", "--host-resolver-rules=MAP *.example 127.0.0.1"]  # as root there is no sandbox


@asynccontextmanager
async def chromium() -> AsyncIterator[Any]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@contextmanager
def website(answer: Callable[[str], tuple[dict[str, str], str]]) -> Iterator[int]:
    """The port of a web server that answers a path with headers and HTML, whatever it is called."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers, text = answer(self.path)
            self.send_response(200)
            for name, value in ({"Content-Type": "text/html; charset=utf-8"} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()
