"""One client for all your LLM keys: it keeps every limit, uses the quota it has, and survives its vendors."""

from .core.client import LLMClient, StreamingCall
from .core.content import Document, Image, Opaque, Refusal, Text, Thinking, ToolCall, ToolResult
from .core.events import Events
from .core.exceptions import (
    AttemptRecord,
    LLMAuthenticationError,
    LLMBudgetExceededError,
    LLMCircuitOpenError,
    LLMConfigurationError,
    LLMConnectionError,
    LLMContentFilteredError,
    LLMContextLengthError,
    LLMDeadlineExceededError,
    LLMException,
    LLMInvalidRequestError,
    LLMModelNotFoundError,
    LLMOverloadedError,
    LLMPoolExhaustedError,
    LLMProtocolError,
    LLMProviderError,
    LLMQuotaExhaustedError,
    LLMRateLimitError,
    LLMRequestTooLargeError,
    LLMStreamInterruptedError,
    LLMTimeoutError,
    Scope,
    TargetFailure,
)
from .core.manager import LLMManager, close_llm_manager, get_llm_manager, set_llm_manager
from .core.settings import LLMSettings, ProviderSettings, Secret
from .core.stream import ResponseStream
from .core.tool_loop import ToolRun
from .core.toolmaking import tool
from .core.tools import Tool
from .core.types import (
    CallOptions,
    Estimate,
    LLMResponse,
    Message,
    MessageRole,
    ModelInfo,
    Options,
    OutputFormat,
    Priority,
    Request,
    Settlement,
    StopReason,
    StreamChunk,
    Target,
    ToolCallDelta,
    Usage,
)
from .middleware.base import Admission, Call, Context, Handler, Middleware, Reply
from .middleware.circuit_breaker import CircuitBreakerMiddleware
from .middleware.fallback import FallbackMiddleware
from .middleware.logging import LoggingMiddleware
from .middleware.metrics import MetricsMiddleware
from .middleware.rate_limiter import RateLimitMiddleware
from .middleware.retry import RetryMiddleware
from .middleware.stack import Layer
from .providers.base import Provider
from .stores.base import Store
from .transports.base import Transport

__version__ = "0.1.0"

__all__ = [
    "Admission",
    "AttemptRecord",
    "Call",
    "CallOptions",
    "CircuitBreakerMiddleware",
    "Context",
    "Document",
    "Estimate",
    "Events",
    "FallbackMiddleware",
    "Handler",
    "Image",
    "LLMAuthenticationError",
    "LLMBudgetExceededError",
    "LLMCircuitOpenError",
    "LLMClient",
    "LLMConfigurationError",
    "LLMConnectionError",
    "LLMContentFilteredError",
    "LLMContextLengthError",
    "LLMDeadlineExceededError",
    "LLMException",
    "LLMInvalidRequestError",
    "LLMManager",
    "LLMModelNotFoundError",
    "LLMOverloadedError",
    "LLMPoolExhaustedError",
    "LLMProtocolError",
    "LLMProviderError",
    "LLMQuotaExhaustedError",
    "LLMRateLimitError",
    "LLMRequestTooLargeError",
    "LLMResponse",
    "LLMSettings",
    "LLMStreamInterruptedError",
    "LLMTimeoutError",
    "Layer",
    "LoggingMiddleware",
    "Message",
    "MessageRole",
    "MetricsMiddleware",
    "Middleware",
    "ModelInfo",
    "Opaque",
    "Options",
    "OutputFormat",
    "Priority",
    "Provider",
    "ProviderSettings",
    "RateLimitMiddleware",
    "Refusal",
    "Reply",
    "Request",
    "ResponseStream",
    "RetryMiddleware",
    "Scope",
    "Secret",
    "Settlement",
    "StopReason",
    "Store",
    "StreamChunk",
    "StreamingCall",
    "Target",
    "TargetFailure",
    "Text",
    "Thinking",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolResult",
    "ToolRun",
    "Transport",
    "Usage",
    "__version__",
    "close_llm_manager",
    "get_llm_manager",
    "set_llm_manager",
    "tool",
]
