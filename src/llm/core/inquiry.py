"""Questions to a vendor that cost nothing: which models there are, and how many tokens a request has.

They take nothing of a quota, are no calls, and are not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..providers.base import Inquirable, Provider
from ..transports.base import Exchange, HTTPRequest, Transport
from ..utils.alarms import Alarms, Limit
from ..utils.clock import Clock
from ..utils.redact import credentials, redact
from .exceptions import LLMException, LLMInvalidRequestError, LLMOverloadedError, LLMTimeoutError
from .pool import Key, ProviderPool
from .types import ModelInfo, Request

SECONDS = 30.0
"""What a vendor is given for an answer."""
MOST_PAGES = 50
"""Pages of a list that are read: no vendor has that many models."""


class Inquiry:
    """Asks one provider, with the first of its keys that is able. *secrets* are those that no error may repeat."""

    def __init__(
        self,
        name: str,
        provider: Provider,
        transport: Transport,
        pool: ProviderPool,
        *,
        clock: Clock,
        secrets: Sequence[str] = (),
    ) -> None:
        self._name = name
        self._provider = provider
        self._transport = transport
        self._pool = pool
        self._clock = clock
        self._secrets = secrets
        self._alarms = Alarms(SECONDS, clock)

    async def models(self) -> tuple[ModelInfo, ...]:
        """Every model that the vendor names.

        Raises:
            LLMException: no key is able to ask, or the vendor does not answer well.
        """
        provider = self._inquirable("list models")
        key = self._key(None)
        found: list[ModelInfo] = []
        after: str | None = None
        for _ in range(MOST_PAGES):
            body = await self._ask(key, Request((), ""), provider.models_request(key.secret(), after))
            page, after = provider.read_models(body)
            found += page
            if after is None:
                break
        return tuple(found)

    async def count_tokens(self, request: Request, model: str | None) -> int:
        """How many input tokens *request* has, by the vendor's count. Raises as ``models`` does."""
        provider = self._inquirable("count tokens; estimate() guesses them")
        key = self._key(model)
        request = Request(request.messages, model or key.model or self._pool.default_model or "", request.options)
        body = await self._ask(key, request, provider.count_request(request, key.secret()))
        return provider.read_count(body)

    def close(self) -> None:
        """Let go of the timer."""
        self._alarms.close()

    def _inquirable(self, what: str) -> Inquirable:
        if isinstance(self._provider, Inquirable):
            return self._provider
        raise LLMInvalidRequestError(f"the provider {self._name} has no way to {what}", provider=self._name)

    def _key(self, model: str | None) -> Key:
        route = self._pool.route(model)
        if (refusal := self._pool.refusal(route)) is not None:
            raise refusal
        now = self._clock.now()
        for key in route:
            if key.available_at <= now:
                return key
        raise LLMOverloadedError(
            "every key is paused",
            provider=self._name,
            retryable=True,
            retry_after=min(key.available_at for key in route) - now,
        )

    async def _ask(self, key: Key, request: Request, asked: HTTPRequest) -> bytes:
        try:
            with Limit(self._alarms):
                response = await self._transport.send(asked, Exchange())
                try:
                    body = await response.read()
                finally:
                    response.close()
            if not 200 <= response.status < 300:
                raise self._provider.classify(request, response.status, response.headers, body)
        except TimeoutError:
            error: LLMException = LLMTimeoutError(f"no answer within {SECONDS:g} s", phase="attempt")
        except LLMException as raised:
            error = raised
        else:
            return body
        error.provider, error.key_id = self._name, key.ref.id
        redact(error, key.secret(), *self._secrets, *credentials(request.options.extra_headers))
        try:
            raise error
        finally:
            del error
