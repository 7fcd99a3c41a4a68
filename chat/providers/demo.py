"""Two models that need no key and no network: the default of a new installation, and the models of the tests.

The same conversation always gets the same answer. Commands in the user's message make it misbehave; `/help` lists
them. The demo provider applies the timeouts of `Limits` itself, as every provider does.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice
from zlib import crc32

import msgspec

from ..settings import Model
from . import ChatMessage, Finish, Limits, ProviderError, Say, Think
from .clean import clean

SCHOLAR = """### {Topic}: a short survey

{opening} Of your words (**{words}** in all) **{topic}** carries most of the weight, so I begin there.

1. **Define it.** What would have to be false for *{topic}* to mean nothing?
2. **Measure it.** A claim without a number is a mood.
3. **Doubt it.** Ask who would disagree, and why they might be right.

| Quantity | Value | Remark |
|---|---:|---|
| Words in your message | {words} | counted, not guessed |
| Letters in “{topic}” | {letters} | see the code below |
| Messages from you so far | {turn} | including this one |

```python
def weigh(topic: str = "{topic}") -> int:
    return sum(letter.isalpha() for letter in topic)  # {letters}
```

In conclusion: {conclusion}
"""

POET = """*{opening}*

> {Topic} came in without a sound,
> left {words} petals on the ground,
> and asked me, softly, which was true:
> the one I read, or the one you knew.

What I hear in it:

- a door left open, somewhere, for **{topic}**
- {letters} letters, each with its coat still on
- and you, at message {turn}, still listening

| Light | Shadow |
|---|---|
| {topic} | what it cost |
| the question | the asking |

```text
{topic}
  falls slowly
    through the margin
```

{conclusion}
"""

LINES = {
    "scholar": ("Let us be precise.", "A good question deserves an orderly answer.", "Consider the evidence first."),
    "poet": ("Oh, this again, and yet for the first time.", "The window is open; so am I.", "Hush, a word is landing."),
}
CONCLUSIONS = {
    "scholar": ("that is a question worth {words} more words.", "the matter is settled until somebody measures it."),
    "poet": ("Keep the rest. It was always yours.", "Ask me tomorrow; the tide will have an opinion."),
}
HELLO = """{line} I am a **demo model**: I live in this service, need no network, and make my answers up.

To talk to a real one, set a single environment variable, `OPENAI_API_KEY` (or `ANTHROPIC_API_KEY`), and start the \
service again. Until then ask me anything, or type `/help` to see me misbehave.
"""
GREETING = re.compile(r"\W*(hello|hi|hey|hallo|hola|bonjour|namaste|नमस्ते)\b", re.IGNORECASE)
NUMBER = re.compile(r"\s*(\d{1,6}(?:\.\d{1,3})?)(?=\s|$)")


class Script(msgspec.Struct, frozen=True):
    """The plan of a demo reply: these tokens at this speed, then this ending."""

    tokens: Iterable[str]
    pace: float
    error: ProviderError | None = None
    timed: bool = False  # a token `⟨3⟩` is said `⟨3:<µs of the monotonic clock as it leaves>⟩`
    ending: str = "finish"  # or "truncate": just stop; or "silence": say nothing until the listener gives up


class Demo:
    def __init__(self, models: Iterable[Model], environ: Mapping[str, str]) -> None:
        """Built like every provider; a demo model has no key to look for."""

    async def answer(
        self, model: Model, messages: Sequence[ChatMessage], limits: Limits, say: Say, think: Think
    ) -> Finish:
        script, count = scripted(model, messages), 0
        clock = asyncio.get_running_loop().time
        started = clock()
        for token in script.tokens:
            if count == limits.max_tokens:
                break
            # by the clock from the start: the time a token takes to leave would otherwise slow the next ones down
            due = started + count * script.pace - clock()
            if due > limits.idle_timeout:
                await _pass(due, limits.idle_timeout)
            await asyncio.sleep(max(0.0, due))
            if script.timed:
                token = token.replace("⟩", f":{time.monotonic_ns() // 1000}⟩")
            say(token)
            count += 1
        else:
            if script.ending == "silence":
                await _pass(float("inf"), limits.first_token_timeout)
            if script.error:
                raise script.error
            if script.ending == "truncate":
                raise ProviderError("provider_truncated")
        asked = sum(len(tokens_of(message.content)) for message in messages)
        return Finish("length" if count == limits.max_tokens else "stop", asked, count)

    async def close(self) -> None:
        """There is nothing to close."""


async def _pass(seconds: float, most: float) -> None:
    await asyncio.sleep(min(seconds, most))
    if seconds > most:
        raise ProviderError("provider_timeout")


def tokens_of(text: str) -> list[str]:
    """Split into words with the space behind them: joined they are the text again."""
    return re.findall(r"\S+\s*|\s+", text)


def scripted(model: Model, messages: Sequence[ChatMessage]) -> Script:
    said = [message.content for message in messages if message.role == "user"]
    text = clean(said[-1]) if said else ""
    name, _, argument = text.lstrip().partition(" ")
    command = COMMANDS.get(name.strip())
    for_the_other = command is not _echo and _number(argument, 0)[1] in LINES.keys() - {personality(model)}
    if command is None or for_the_other:
        return Script(tokens_of(answered(personality(model), text, len(said))), model.pace)
    return command(model, argument)


def personality(model: Model) -> str:
    return model.personality if model.personality in LINES else "scholar"


def answered(who: str, text: str, turn: int) -> str:
    """Return the answer of a personality to a text; it picks up the word that stands out."""
    words, seed = re.findall(r"\w+", text), crc32(text.encode(errors="replace"))
    topic = max((word for word in words if word.isalpha()), key=len, default="silence")[:40].lower()
    line = LINES[who][seed % len(LINES[who])]
    if GREETING.match(text):
        return HELLO.format(line=line)
    facts = {"topic": topic, "Topic": topic.capitalize(), "words": len(words), "letters": len(topic), "turn": turn}
    conclusion = CONCLUSIONS[who][seed // 8 % 2].format(**facts)
    return (POET if who == "poet" else SCHOLAR).format(**facts, opening=line, conclusion=conclusion)


def _number(argument: str, default: float) -> tuple[float, str]:
    found = NUMBER.match(argument)
    return (float(found[1]), argument[found.end() :].strip()) if found else (default, argument.strip())


def _prose(model: Model, count: float) -> Iterable[str]:
    text = answered(personality(model), "a long story about rivers, patience and machines", 1)
    return islice(cycle(tokens_of(text)), int(count))


def _count(model: Model, argument: str) -> Script:
    """`/count 200`: that many numbered tokens; `/count 200 50`: so many a second, each with its time in µs."""
    number, rest = _number(argument, 100)
    count, (rate, rest) = int(number), _number(rest, 0)
    filler = "·" * int(_number(rest, 0)[0])
    tokens = (f"⟨{n}⟩{filler}" + " " * (n < count - 1) for n in range(count))
    return Script(tokens, 1 / rate if rate else model.pace, timed=rate > 0)


def _echo(model: Model, argument: str) -> Script:
    """`/echo text`: your own words, exactly."""
    return Script(tokens_of(argument), model.pace)


def _fail(model: Model, argument: str) -> Script:
    """`/fail 5`: that many tokens, then an error."""
    error = ProviderError("provider_unavailable", retryable=True)
    return Script(_prose(model, _number(argument, 5)[0]), model.pace, error)


def _help(model: Model, argument: str) -> Script:
    """`/help`: this list."""
    lines = ["I can misbehave on request; end a command with `scholar` or `poet` to ask only one of us.", ""]
    lines += [f"- {(command.__doc__ or '').strip()}" for command in COMMANDS.values()]
    return Script(tokens_of("\n".join(lines) + "\n"), model.pace)


def _long(model: Model, argument: str) -> Script:
    """`/long 500`: that many tokens."""
    return Script(_prose(model, _number(argument, 1000)[0]), model.pace)


def _rate(model: Model, argument: str) -> Script:
    """`/rate 2`: too many requests, come back in that many seconds."""
    wait = _number(argument, -1)[0]
    error = ProviderError("provider_rate_limited", retryable=True, retry_after=None if wait < 0 else wait)
    return Script((), 0, error)


def _silent(model: Model, argument: str) -> Script:
    """`/silent`: not one token, until you give up."""
    return Script((), 0, ending="silence")


def _slow(model: Model, argument: str) -> Script:
    """`/slow 0.2 text`: an answer to the text with that many seconds between tokens (1)."""
    pace, text = _number(argument, 1)
    return Script(tokens_of(answered(personality(model), text, 1)), pace)


def _truncate(model: Model, argument: str) -> Script:
    """`/truncate 5`: that many tokens, then the stream just ends."""
    return Script(_prose(model, _number(argument, 5)[0]), model.pace, ending="truncate")


COMMANDS: dict[str, Callable[[Model, str], Script]] = {
    f"/{command.__name__[1:]}": command
    for command in (_help, _count, _echo, _long, _slow, _silent, _fail, _truncate, _rate)
}
