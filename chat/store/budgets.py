"""The daily budgets: tokens of an account, of an address and of the whole service, reserved before a model is asked.

A turn reserves the most it can cost, in one statement inside its own transaction, so that parallel requests cannot
pass a limit together. When the turn has ended, the worker that began it gives back the tokens it did not use. Tokens
are counted by the provider if it sends its counts, else as bytes: in no script does a tokenizer make more tokens of a
text than it has bytes. Models that cost nothing reserve nothing: slow ones could hold the whole budget of the others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import ChatError
from ..settings import Model
from .database import Database, StorageUnavailable
from .queries import Query

T = TypeVar("T")

FRAME = 8  # tokens a provider adds around one message for its role and separators: 3 to 5 with the ones we know
KEPT = 35 * 86_400_000  # milliseconds a day's budgets are kept


def tokens_of(text: str) -> int:
    """The most tokens any model may make of a text: its bytes in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def prompt_tokens(messages: Iterable[str]) -> int:
    """The most tokens one call with these messages' texts takes in, the frame around the whole included."""
    return FRAME + sum(FRAME + tokens_of(text) for text in messages)


class Meter:
    """The cost of one reply, counted on arrival: text that readers are never shown counts as well.

    A call is charged its input from the moment it begins, whatever comes of the call; a second call is charged again.
    The provider's own counts replace ours where it sends them.
    """

    def __init__(self, prompt: int, max_tokens: int, *, free: bool = False, thinks: bool = False) -> None:
        """prompt: `prompt_tokens` of what is sent; max_tokens: as asked of the provider; free: it costs nothing.

        thinks: the model thinks in silence before its text; an interrupted call has no count of that.
        """
        self._prompt = prompt
        self._most = max_tokens
        self._free = free
        self._thinks = thinks
        self._spent = 0  # of the calls before this one
        self._input = self._output = 0  # of this call, as measured

    @property
    def most(self) -> int:
        """The tokens to reserve for one call."""
        return 0 if self._free else self._prompt + self._most

    @property
    def spent(self) -> int:
        return 0 if self._free else self._spent + self._input + self._output

    def call(self) -> None:
        """Begin a call: the provider is about to be asked, for the first or second time."""
        self._spent, self._input, self._output = self.spent, self._prompt, 0

    def came(self, text: str) -> None:
        """Count a piece of the answer that has arrived."""
        if not self._free:  # counting costs more than most of what is done with a piece
            self._output += tokens_of(text)

    def thought(self, size: int) -> None:
        """Count a piece of a thought, which no reader is shown. size: bytes."""
        self._output += size

    def cut(self) -> None:
        """End a call before its end. A call without text may have thought in silence, up to its limit."""
        if self._input and (self._thinks or not self._output):
            self._output = max(self._output, self._most)

    def told(self, input_tokens: int | None, output_tokens: int | None) -> None:
        """Replace our counts of this call by the provider's. A missing count, or 0, leaves our own."""
        self._input, self._output = input_tokens or self._input, output_tokens or self._output


def metered(model: Model | None, messages: Iterable[str], max_tokens: int) -> Meter:
    """The meter of one reply of this model to these messages' texts. None: a model that is not there costs nothing."""
    if model is None:
        return Meter(0, 0, free=True)
    most = min(max_tokens, model.max_tokens or max_tokens)
    return Meter(prompt_tokens(messages), most, free=model.free, thinks=model.thinks)


@dataclass(frozen=True, slots=True)
class Budget:
    """The tokens that somebody may use on one day. limit: 0 for no limit; the tokens are counted all the same."""

    name: str
    limit: int


def budgets_of(
    account_id: str, networks: Iterable[tuple[str, int]], limits: tuple[int, int, int]
) -> tuple[Budget, ...]:
    """The budgets a turn draws on, in the order of their names.

    networks: hashes of an address and of the network around it, each with how many times the limit it may use;
    limits: those of the account, the address and the service. Every transaction takes the rows in this order: two
    transactions would wait for each other otherwise.
    """
    account, address, service = limits
    around = sorted((f"address:{network}", address * times) for network, times in networks)
    named = [(f"account:{account_id}", account), *around, ("service", service)]
    return tuple(Budget(name, limit) for name, limit in named)


@dataclass(frozen=True, slots=True)
class Reservation:
    """The tokens taken from each of these budgets on this UTC day."""

    day: str
    names: tuple[str, ...]
    tokens: int


async def reserve(
    query: Query, now: int, budgets: Sequence[Budget], tokens: int, daily_messages: int = 0
) -> Reservation:
    """Take `tokens` from each budget, and one message from the first one's `daily_messages` (0: any number).

    Call this last inside a transaction: all turns write the service's row, and an error here undoes the transaction.
    Raises `daily_limit_reached`, or `budget_exhausted` when a budget has too few tokens left.
    """
    reservation = Reservation(_day(now), tuple(budget.name for budget in budgets), tokens)
    places = ", ".join(f"(:name{n}, :day, :tokens, 1)" for n in range(len(budgets)))
    rows = await query.fetch_all(
        f"""INSERT INTO budgets (name, day, tokens, messages) VALUES {places}
            ON CONFLICT (name, day) DO UPDATE
                SET tokens = budgets.tokens + :tokens, messages = budgets.messages + 1
            RETURNING name, tokens, messages""",
        {"day": reservation.day, "tokens": tokens} | {f"name{n}": name for n, name in enumerate(reservation.names)},
    )
    spent = {row["name"]: row for row in rows}
    if daily_messages and spent[reservation.names[0]]["messages"] > daily_messages:
        raise ChatError("daily_limit_reached", f"You have reached today's limit of {daily_messages} messages.")
    if tokens and any(each.limit and spent[each.name]["tokens"] > each.limit for each in budgets):
        message = "Today's budget is used up. Please come back tomorrow."
        raise ChatError("budget_exhausted", message, retry_after=3600)
    return reservation


class Refunds:
    """The tokens that ended turns reserved and did not use, until they are given back to the budgets together."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tokens: Counter[tuple[str, str]] = Counter()  # by the budget's name and day

    def settle(self, reservation: Reservation, meters: Iterable[Meter]) -> None:
        """Note the unused tokens of a turn that has ended.

        Tokens spent beyond the reservation (a second call) are charged with the next write.
        """
        if unused := reservation.tokens - sum(meter.spent for meter in meters):
            for name in reservation.names:
                self._tokens[name, reservation.day] += unused

    async def attempt(self, reserve: Callable[[], Awaitable[T]]) -> T:
        """Reserve tokens; where the budget does not allow that, give back what others have not used and try again."""
        try:
            return await reserve()
        except ChatError as problem:
            if problem.code != "budget_exhausted" or not self._tokens:
                raise
        await self.give_back()
        return await reserve()

    async def give_back(self) -> None:
        """Subtract the tokens from their budgets in the database. Raises `StorageUnavailable`.

        The tokens are tried again later, unless the failed transaction may have been written.
        """
        tokens, self._tokens = self._tokens, Counter()
        # in the order `reserve` takes the rows: two transactions would wait for each other otherwise
        values = [{"name": name, "day": day, "tokens": tokens[name, day]} for name, day in sorted(tokens)]

        async def work(query: Query) -> None:
            await query.execute_many(
                "UPDATE budgets SET tokens = tokens - :tokens WHERE day = :day AND name = :name", values
            )

        try:
            if values:
                await self._database.transaction(work)
        except StorageUnavailable as problem:
            if not problem.in_doubt:
                for place in tokens:  # not `+=` of counters, which drops negative counts: the cost of a second call
                    self._tokens[place] += tokens[place]
            raise


async def delete_old_budgets(database: Database) -> None:
    """Delete the budgets of days that were over `KEPT` ago."""
    await database.execute_in_pieces(
        """DELETE FROM budgets WHERE (name, day) IN (SELECT name, day FROM budgets WHERE day < :day LIMIT :piece)
           RETURNING name""",
        {"day": _day(database.now() - KEPT)},
    )


def _day(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(milliseconds / 1000))
