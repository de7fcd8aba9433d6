"""Writes `providers.md` from the table of models and from what the dialects do: `make providers`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "bench"))

from wire_corpus import families, features  # noqa: E402  # what features there are, it knows best

from llm.core.exceptions import LLMInvalidRequestError  # noqa: E402
from llm.core.settings import ProviderSettings  # noqa: E402
from llm.core.types import Request  # noqa: E402
from llm.providers.anthropic import AnthropicProvider  # noqa: E402
from llm.providers.base import Provider  # noqa: E402
from llm.providers.catalog import Family, Vendor, catalog  # noqa: E402
from llm.providers.openai import OpenAIProvider  # noqa: E402
from llm.providers.openai_responses import OpenAIResponses  # noqa: E402

DIALECTS: dict[str, type[AnthropicProvider | OpenAIProvider | OpenAIResponses]] = {
    "anthropic": AnthropicProvider,
    "openai": OpenAIProvider,
    "openai_responses": OpenAIResponses,
}
INTRODUCTION = """# Providers

Written by `make providers` from `src/llm/providers/models.toml` and from what the dialects do with each feature; a test
compares. The table was checked against the vendors' pages on {as_of}.

Three dialects: `anthropic` (Messages), `openai` (Chat Completions) and `openai_responses` (Responses). `openai` uses
the Responses API by itself where Chat Completions refuses: for tools with models that think, for conversations that
hold its reasoning, for documents by address and for results with pictures. A provider under another address
(`base_url`) is taken to accept everything, and no rule below is applied to it; `capabilities` in the configuration
overrules the table for models by pattern, at any address. A model that the table does not know is taken for one of the
vendor's newest.

What a model refuses is never sent. A hint that only colours the answer (temperature, top_p, top_k, penalties, seed) is
left out, with a warning in `response.warnings` and one in the log; everything else is an `LLMInvalidRequestError` that
names the option and the model. `unsupported: raise` makes it an error for hints as well.

`reasoning=` is a word (`none` to `max`) or a number of tokens. A word that a model does not know becomes the next lower
one that it knows, except for `none`. Anthropic's older models count tokens of thinking: for them a word is a share of
`max_tokens` (low 20 %, medium 50 %, high 80 %).

`output_format=` (and `client.parse`) uses the vendor's own means where the model has them and the schema is strict,
else a tool that must be called, else words in the prompt.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION.format(as_of=catalog().as_of)]
    for name, vendor in (("Anthropic", catalog().anthropic), ("OpenAI", catalog().openai)):
        parts.append(f"## {name}'s models\n\n" + "\n".join(_rows(FAMILY, [_family(f) for f in vendor.families])) + "\n")
        parts.append(f"### Retired, or going to be\n\n{_retired(vendor)}\n")
    parts.append(MATRIX + "\n" + "\n".join(_rows(("feature", *DIALECTS), list(_matrix()))) + "\n")
    return "\n".join(parts)


FAMILY = (
    "models",
    "hints and options it refuses",
    "thinking",
    "effort",
    "tools over Chat Completions",
    "can be made to call a tool",
    "formats",
    "longest answer",
)
MATRIX = """## Features and dialects

Of how many of the dialect's families of models each feature is taken, at the vendor's own address; the others refuse it
before anything is sent.
"""


def _family(family: Family) -> Sequence[str]:
    refuses = ", ".join(sorted(family.refuses)) or "-"
    if family.free_at_effort is not None:
        refuses += f" (none at effort `{family.free_at_effort}`)"
    if family.temperature_or_top_p:
        refuses = "temperature with top_p"
    efforts = ", ".join(family.efforts) or "-"
    if family.responses_efforts:
        efforts += f" (Responses: {', '.join(family.responses_efforts)})"
    return (
        ", ".join(f"`{model}`" for model in family.models),
        refuses,
        ", ".join(family.thinking) or "-",
        efforts,
        family.chat_tools.replace("_", " "),
        "yes" if family.forced_tools else "no",
        family.formats,
        f"{family.max_output:,}" if family.max_output else "-",
    )


def _retired(vendor: Vendor) -> str:
    rows = [(f"`{name}`", str(row.on), f"`{row.use}`") for name, row in vendor.retired.items()]
    return "\n".join(_rows(("model", "on", "use"), sorted(rows, key=lambda row: row[1])))


def _matrix() -> Iterator[Sequence[str]]:
    taken: dict[str, dict[str, str]] = {}
    for dialect, made in DIALECTS.items():
        provider: Provider = made(ProviderSettings(name=dialect, dialect=dialect, keys=()))
        models = families(dialect).values()
        for name, feature in features(dialect).items():
            count = 0
            for model in models:
                try:
                    provider.encode(Request(feature.messages, model, feature.options, feature.stream), "a-key")
                except LLMInvalidRequestError:
                    continue
                count += 1
            said = "all" if count == len(models) else f"{count} of {len(models)}" if count else "none"
            taken.setdefault(name, {})[dialect] = said
    for name, row in taken.items():
        yield (name, *(row.get(dialect, "-") for dialect in DIALECTS))


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


if __name__ == "__main__":
    (HERE / "providers.md").write_text(page(), "utf-8")
