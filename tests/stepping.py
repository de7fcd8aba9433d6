"""Cancelling one call at each of the points where it waits."""

from __future__ import annotations

import asyncio
import re
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Literal, TypeVar

from llm.core.types import Cost
from llm.transports.base import Exchange, HTTPRequest, Transport, TransportResponse
from llm.utils.appraisal import PER_BYTE
from llm.utils.clock import Clock

T = TypeVar("T")

Moment = Literal["waiting", "waking"]
MOMENTS: tuple[Moment, ...] = ("waiting", "waking")
"""*waiting*: soon after it began to wait. *waking*: what it waited for has come, and it has not been told yet."""


class Steps:
    """Runs a coroutine, counts how often it waits, and cancels its task at number *at*, if one is given."""

    def __init__(self, at: int | None = None, moment: Moment = "waiting") -> None:
        self.at = at
        self.moment = moment
        self.waits = 0
        self.struck = False

    def __repr__(self) -> str:
        return f"<Steps: {self.waits} waits, to be cancelled at {self.at} {self.moment}>"

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        async def stepping() -> T:
            return await self._step(coroutine)

        return asyncio.create_task(stepping())

    @types.coroutine
    def _step(self, coroutine: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
        error: BaseException | None = None
        while True:
            try:
                # What it yields is the future that its task is to wait for.
                future = coroutine.send(None) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]  # the coroutine's own result
            finally:
                error = None
            self.waits += 1
            if self.waits == self.at:
                self._aim(future)
            try:
                yield future
            except BaseException as thrown:
                error = thrown

    def _aim(self, future: asyncio.Future[Any] | None) -> None:
        task = asyncio.current_task()
        assert task is not None

        def strike(_: object = None) -> None:
            self.struck = True
            task.cancel()

        if future is None or self.moment == "waiting":
            asyncio.get_running_loop().call_soon(strike)
        else:
            # Before the task's own callback, which is added when the future gets there.
            future.add_done_callback(strike)


TEXT = re.compile(rb'"content": ?"([^"]*)"')
"""Of the events of a stream."""


class Attempt:
    """What went over the wire of one request."""

    def __init__(self, request: HTTPRequest, exchange: Exchange, at: float) -> None:
        self.request = request
        self.exchange = exchange
        self.at = at
        self.status = 0
        self.received = b""
        self.ended = False

    def cost(self, reserved: Cost, used: Cost, *, answered: bool) -> Cost:
        """What it costs by the refund table: *reserved* was taken for it, *used* is what a whole answer tells.

        *answered*: the call ended well, so that its last whole answer has been handed over.
        """
        if not self.exchange.connected:
            return Cost(0, 0, 0)
        if self.status >= 400 and self.ended:
            return Cost(1, 0, 0)
        if b"[DONE]" in self.received or (self.ended and answered):
            return used
        # Broken off: its input is paid, and what was seen of its output, in tokens of the usual size.
        seen = sum(map(len, TEXT.findall(self.received))) if b"data: " in self.received else 0
        return Cost(1, reserved.input_tokens, int(seen * PER_BYTE))


class Watched:
    """A transport that keeps a record of what another one does."""

    def __init__(self, transport: Transport, clock: Clock) -> None:
        self._transport = transport
        self._clock = clock
        self.attempts: list[Attempt] = []
        """Of requests for an answer; probes are not billed."""

    async def send(self, request: HTTPRequest, exchange: Exchange) -> TransportResponse:
        attempt = Attempt(request, exchange, self._clock.now())
        if request.method == "POST":
            self.attempts.append(attempt)
        response = await self._transport.send(request, exchange)
        attempt.status = response.status
        return WatchedResponse(response, attempt)

    async def close(self) -> None:
        await self._transport.close()

    def statistics(self) -> dict[str, int]:
        return self._transport.statistics()


class WatchedResponse:
    def __init__(self, response: TransportResponse, attempt: Attempt) -> None:
        self._response = response
        self._attempt = attempt
        self.status = response.status
        self.headers = response.headers
        self.close = response.close

    async def read(self) -> bytes:
        body = await self._response.read()
        self._attempt.received += body
        self._attempt.ended = True
        return body

    async def read_some(self) -> bytes:
        data = await self._response.read_some()
        self._attempt.received += data
        self._attempt.ended = self._attempt.ended or not data
        return data


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until *condition* holds; the test's own time limit is the bound."""
    while not condition():
        await asyncio.sleep(0)


def other_tasks() -> set[asyncio.Task[Any]]:
    """All tasks but the one that asks."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
