"""What Chat Completions and Responses share: one vendor's addresses, headers, errors, limits and models."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, Final

from ..core.exceptions import (
    LLMContentFilteredError,
    LLMContextLengthError,
    LLMException,
    LLMInvalidRequestError,
    LLMModelNotFoundError,
    LLMQuotaExhaustedError,
)
from ..core.settings import ProviderSettings
from ..core.types import Counting, Headers, LimitState, ModelInfo, ObservedLimits, Options, Request
from ..transports.base import HTTPRequest
from ..utils.error_body import ErrorBody, read_error_body
from ..utils.header_values import whole_number
from ..utils.http_errors import build_error, error_for_status, unreadable
from .catalog import Family, Refuse, catalog, effort_for, rules_for
from .listing import read_count, read_models
from .quota import Groups, count, merged, owners, seconds

BASE_URL: Final = "https://api.openai.com/v1"

STATUS_BY_TYPE: Final = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "invalid_prompt": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "model_not_found": 404,
    "requests": 429,
    "tokens": 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "slow_down": 429,
    "server_error": 500,
    "server_is_overloaded": 503,
    "service_unavailable_error": 503,
}
"""The status an error would have had if it had not come under 200, by its code or its type."""

ERROR_BY_CODE: Final[dict[str, type[LLMException]]] = {
    "insufficient_quota": LLMQuotaExhaustedError,
    "credit_balance_exhausted": LLMQuotaExhaustedError,
    "organization_spend_limit_exceeded": LLMQuotaExhaustedError,
    "project_spend_limit_exceeded": LLMQuotaExhaustedError,
    "organization_usage_limit_exceeded": LLMQuotaExhaustedError,
    "billing_hard_limit_reached": LLMQuotaExhaustedError,
    "context_length_exceeded": LLMContextLengthError,
    "exceed_context_size_error": LLMContextLengthError,
    "model_not_found": LLMModelNotFoundError,
    "content_filter": LLMContentFilteredError,
    "content_policy_violation": LLMContentFilteredError,
    "invalid_prompt": LLMContentFilteredError,
    "bio_policy": LLMContentFilteredError,
    "cyber_policy": LLMContentFilteredError,
    "misalignment_policy_violation": LLMContentFilteredError,
}
"""Codes and types that mean the same under any status: a spent quota comes as 429, 400 and 403."""

_LIMIT_HEADERS: Final = tuple(
    (f"x-ratelimit-limit-{name}", f"x-ratelimit-remaining-{name}", f"x-ratelimit-reset-{name}")
    for name in ("requests", "tokens", "project-tokens")
)
# The vendor has no word for it; compatible servers do.
_NO_WORD: Final = frozenset(("top_k",))


class OpenAIBase:
    """A dialect of OpenAI's at one address; *path* is where it answers."""

    def __init__(self, settings: ProviderSettings, path: str) -> None:
        vendor = catalog().openai
        self.name = settings.name
        self.default_model: str | None = vendor.default
        self._custom = settings.custom
        self._settings = settings
        self._vendor = vendor
        self._refused = frozenset() if settings.custom else _NO_WORD
        self._strict = settings.unsupported == "raise"
        self._extra_body = settings.extra_body
        # Azure's classic addresses end in a query.
        base, mark, query = (settings.base_url or BASE_URL).partition("?")
        base = base.rstrip("/")
        self._url = f"{base}/{path}{mark}{query}"
        self._probe_url = f"{base}/models{mark}{query}"
        self._extra_headers = {name.lower(): value for name, value in settings.extra_headers.items()}
        self._headers = {"content-type": "application/json", "accept": "application/json"}
        self._stream_headers = self._headers | {"accept": "text/event-stream"}
        self._families: dict[str, Family] = {}
        self._groups = Groups(settings, vendor)
        # The vendor says that cached input and refused requests count. Compatible servers may differ (`counting`).
        known = Counting(reserve_max=True, cache_reads=True, rejected=True)
        self.counting = merged(known, settings.counting)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def classify(self, request: Request, status: int, headers: Headers, body: bytes) -> LLMException:
        """The error that *body* means under *status*; of a status 2xx, the error the body tells of."""
        said = read_error_body(body)
        if status < 300:
            if not said.is_error:
                return unreadable(
                    f"status {status} and a body that is no completion", body, provider=self.name, model=request.model
                )
            status = _status(said)
        error = ERROR_BY_CODE.get(said.code) or ERROR_BY_CODE.get(said.type) or error_for_status(status)
        if status == 404 and error is LLMInvalidRequestError and said.structured and request.model in said.message:
            # Compatible servers have no code for it; a wrong path does not know the model's name.
            error = LLMModelNotFoundError
        hint = ""
        if error is LLMModelNotFoundError:
            gone = self._vendor.retirement(request.model)
            hint = f"the vendor's date for its retirement is {gone.on}; use {gone.use}" if gone else ""
        return build_error(
            error,
            said,
            provider=self.name,
            model=request.model,
            status=status,
            headers=headers,
            body=body,
            code=said.code or said.type or None,
            request_id=headers.get("x-request-id") or said.request_id,
            obey_retry=not self._custom,
            hint=hint,
        )

    def limits(self, headers: Headers) -> ObservedLimits | None:
        """The ``x-ratelimit-*`` headers; their resets are durations. ``tokens`` is input and output together.

        Of the organisation's tokens and the project's, which are limits of their own, the one with less left is told.
        """
        requests, tokens, of_project = (_limit(headers, names) for names in _LIMIT_HEADERS)
        if of_project is not None and (tokens is None or _left(of_project) < _left(tokens)):
            tokens = of_project
        named = owners(headers.get("openai-organization"), None, headers.get("openai-project"))
        if requests is None and tokens is None and not named:
            return None
        return ObservedLimits(requests=requests, tokens=tokens, owners=named)

    def group(self, model: str) -> str:
        """The configured group of *model*, or the model of which it is a dated snapshot."""
        return self._groups[model]

    def goes_on(self, model: str) -> bool:
        """Only where the configuration says so: OpenAI's models, and most servers', begin another answer."""
        rules = self._settings.rules(model)
        return rules is not None and bool(rules.prefill)

    def probe(self, key: str) -> HTTPRequest:
        """The list of models: free, and refused like any other request if the key is."""
        headers = {"accept": "application/json", "authorization": f"Bearer {key}", **self._extra_headers}
        return HTTPRequest("GET", self._probe_url, headers)

    def models_request(self, key: str, after: str | None) -> HTTPRequest:
        """The list of models, which comes in one page."""
        return self.probe(key)

    def read_models(self, body: bytes) -> tuple[list[ModelInfo], str | None]:
        """The models; there is no other page."""
        return read_models(body, None if self._custom else self._vendor, provider=self.name)

    def read_count(self, body: bytes) -> int:
        """The number in its answer."""
        return read_count(body, provider=self.name)

    def replacement(self, model: str) -> str | None:
        """The successor of a model that had retired when ``models.toml`` was last checked."""
        gone = None if self._custom else self._vendor.retirement(model)
        return gone.use if gone is not None and gone.on <= catalog().as_of else None

    def _family(self, model: str) -> Family:
        return self._families.get(model) or self._learn(model)

    def _headers_of(self, options: Options, key: str, *, stream: bool) -> dict[str, str]:
        headers = {**(self._stream_headers if stream else self._headers), "authorization": f"Bearer {key}"}
        if self._extra_headers or options.extra_headers:
            headers.update(self._extra_headers)
            if options.extra_headers:
                headers.update({name.lower(): value for name, value in options.extra_headers.items()})
        return headers

    def _learn(self, model: str) -> Family:
        """The rules for *model*, remembered."""
        family = rules_for(model, self._settings, self._vendor)
        if len(self._families) >= 256:
            # Names may come from the application's own users.
            self._families.clear()
        self._families[model] = family
        return family

    def _word(self, wish: str | int, known: Sequence[str], refuse: Refuse) -> str:
        """The vendor's word for how hard to think, of those that are *known* to the model."""
        if isinstance(wish, int):
            raise refuse("reasoning", wish, "it counts no tokens of thinking; say a word, as 'low' or 'high'")
        if wish in known:
            return wish
        if not known:
            raise refuse("reasoning", wish, "it does not think")
        if wish == "none":
            raise refuse("reasoning", wish, f"it always thinks; the least is {known[0]!r}")
        return effort_for(wish, known)

    def _effort(self, body: dict[str, Any], options: Options, family: Family) -> object:
        """How hard the model is going to think, as far as that is known."""
        said = {**body, **self._extra_body, **(options.extra_body or {})}.get("reasoning_effort")
        return said or family.default_effort

    def _is_strict(self, options: Options) -> bool:
        return options.unsupported == "raise" if options.unsupported is not None else self._strict


def _status(said: ErrorBody) -> int:
    """The status of an error that came under 200. OpenRouter and Gemini give it as the code."""
    code = whole_number(said.code)
    if code is not None and 400 <= code < 600:
        return code
    return STATUS_BY_TYPE.get(said.code) or STATUS_BY_TYPE.get(said.type, 500)


def _limit(headers: Headers, names: tuple[str, str, str]) -> LimitState | None:
    of_limit, of_remaining, of_reset = names
    text = headers.get(of_limit)
    limit, remaining = count(text), count(headers.get(of_remaining))
    # A limit that is no number (Azure: -1) makes "0 remaining" no fact either.
    if limit is None and (text is not None or remaining is None):
        return None
    return LimitState(limit, remaining, seconds(headers.get(of_reset)))


def _left(state: LimitState) -> float:
    return inf if state.remaining is None else state.remaining
