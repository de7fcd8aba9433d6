"""Functions, types and the vendors' own words become tools; what cannot is refused by name."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest

from llm.core.arguments import read_options
from llm.core.exceptions import LLMInvalidRequestError
from llm.core.toolmaking import tool, tool_of
from llm.core.tools import Tool


class Person(pydantic.BaseModel):
    """Somebody."""

    name: str
    age: int | None = None


@dataclasses.dataclass
class Place:
    city: str


def weather(city: str, days: Annotated[int, "how many"] = 3, *, unit: Literal["C", "F"] = "C") -> str:
    """The weather in a city.

    As the office forecasts it.

    Args:
        city (str): Which city,
            written out.
        unit: In what.

    Returns:
        Words.
    """
    return f"{city} {days} {unit}"


def numpy_style(a: int, b: int = 1) -> int:
    """Adds.

    Parameters
    ----------
    a : int
        The first.
    b
        The second,
        if any.

    Returns
    -------
    int
    """
    return a + b


def rest_style(a: int) -> int:
    """Doubles.

    :param int a: What to double.
    :returns: twice that
    """
    return 2 * a


def test_a_function_becomes_a_tool_by_its_signature_and_docstring() -> None:
    made = tool_of(weather)
    assert (made.name, made.description) == ("weather", "The weather in a city.\n\nAs the office forecasts it.")
    assert made.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Which city, written out."},
            "days": {"type": "integer", "description": "how many", "default": 3},
            "unit": {"enum": ["C", "F"], "description": "In what.", "default": "C"},
        },
        "required": ["city"],
    }
    assert made.run is not None
    assert made.run(city="Oslo", unit="F") == "Oslo 3 F"


@pytest.mark.parametrize(
    ("function", "summary", "described"),
    [
        (numpy_style, "Adds.", {"a": "The first.", "b": "The second, if any."}),
        (rest_style, "Doubles.", {"a": "What to double."}),
    ],
)
def test_other_ways_of_writing_docstrings_are_read(function: Any, summary: str, described: dict[str, str]) -> None:
    made = tool_of(function)
    assert made.description == summary
    found = {name: each["description"] for name, each in made.parameters["properties"].items()}
    assert found == described


def test_arguments_become_what_the_function_expects() -> None:
    async def meet(person: Person, place: Place, often: bool = False) -> tuple[Person, Place, bool]:
        return person, place, often

    made = tool_of(meet)
    assert made.run is not None
    given = {"person": {"name": "Jo"}, "place": {"city": "Oslo"}}
    assert asyncio.run(made.run(**given)) == (Person(name="Jo"), Place("Oslo"), False)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"city": 7}, "Expected `str`, got `int` - at `$.city`"),
        ({}, "missing required field `city`"),
        ({"city": "Oslo", "unit": "K"}, "Invalid enum value 'K' - at `$.unit`"),
    ],
)
def test_arguments_that_do_not_fit_are_a_value_error(given: dict[str, Any], complaint: str) -> None:
    run = tool_of(weather).run
    assert run is not None
    with pytest.raises(ValueError, match=re.escape(complaint)):
        run(**given)


class Team(pydantic.BaseModel):
    lead: Person


def test_models_that_hold_models_are_arguments() -> None:
    def hire(team: Team, others: list[Person]) -> str:
        return " ".join([team.lead.name, *(other.name for other in others)])

    made = tool_of(hire)
    assert set(made.parameters["$defs"]) == {"Person"}
    assert made.run is not None
    assert made.run(team={"lead": {"name": "Ann"}}, others=[{"name": "Bo"}]) == "Ann Bo"


def test_what_may_be_anything_cannot_be_strict() -> None:
    def store(value: Any) -> None:
        """Its argument has no type."""

    with pytest.raises(LLMInvalidRequestError, match="store: .* what may be anything"):
        tool(store, strict=True)


def test_a_null_for_what_may_be_left_out_is_taken_for_that() -> None:
    run = tool_of(weather).run
    assert run is not None
    assert run(city="Oslo", days=None, unit=None) == "Oslo 3 C"


def test_methods_partials_and_callable_objects_are_functions() -> None:
    class Office:
        def forecast(self, city: str) -> str:
            """From here."""
            return f"{city}: {type(self).__name__}"

        async def __call__(self, city: str) -> str:
            return city

    office = Office()
    method, bound, called = tool_of(office.forecast), tool_of(partial(weather, days=1)), tool_of(office)
    assert (method.name, method.description) == ("forecast", "From here.")
    assert list(method.parameters["properties"]) == ["city"]
    assert method.run is not None
    assert method.run(city="Oslo") == "Oslo: Office"
    assert (bound.name, called.name) == ("weather", "Office")
    assert called.run is not None
    assert asyncio.run(called.run(city="Oslo")) == "Oslo"


@pytest.mark.parametrize("kind", [Person, Place, msgspec.defstruct("Thing", [("a", int)])])
def test_a_type_is_a_tool_that_nobody_runs(kind: type) -> None:
    made = tool_of(kind)
    assert made.name == kind.__name__
    assert made.run is None
    assert made.parameters["properties"]


@pytest.mark.parametrize(
    "said",
    [
        {"name": "f", "description": "d", "input_schema": {"type": "object"}},
        {"name": "f", "description": "d", "parameters": {"type": "object"}},
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},
        {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}},
    ],
)
def test_the_vendors_own_words_are_understood(said: dict[str, Any]) -> None:
    assert tool_of(said) == Tool(name="f", description="d", parameters={"type": "object"})


def test_some_of_a_tool_can_be_said_otherwise() -> None:
    made = tool(weather, name="forecast", description="Short.", strict=True, cache=True)
    assert (made.name, made.description, made.strict, made.cache) == ("forecast", "Short.", True, True)
    assert made.parameters["required"] == ["city", "days", "unit"]
    assert made.parameters["additionalProperties"] is False


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (7, "expected a function, a type or a Tool, got int"),
        ({"description": "d"}, "got another mapping"),
        ({"name": "f", "parameters": 7}, "are no JSON schema"),
        ({"name": "no spaces"}, "'no spaces' is no name for a tool"),
        ({"name": "f", "strict": True, "parameters": {"type": "object"}}, "free keys"),
        (lambda *args: args, "cannot be one"),
        (lambda **given: given, "cannot be one"),
        (object, "cannot be read from JSON"),
        (max, "max: it has no signature to read"),
    ],
)
def test_what_is_no_tool_is_refused(value: Any, complaint: str) -> None:
    with pytest.raises(LLMInvalidRequestError) as caught:
        tool_of(value)
    assert complaint in str(caught.value)


def test_an_annotation_that_cannot_be_found_or_read_is_named() -> None:
    def lost(a: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
        """What a refactoring leaves behind."""

    def odd(a: asyncio.Event) -> None:
        """No JSON is one."""

    for function, complaint in ((lost, "Nowhere"), (odd, "odd: ")):
        with pytest.raises(LLMInvalidRequestError, match=complaint):
            tool_of(function)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tools": weather}, "tools: expected a list of tools"),
        ({"tools": "weather"}, "tools: expected a list of tools"),
        ({"tools": [weather, weather]}, "tools[1]: there are two of the name 'weather'"),
        ({"tools": [weather, 7]}, "tools[1]: expected a function"),
        ({"tool_choice": "weather"}, "tool_choice='weather': there are no tools"),
        ({"tools": [weather], "tool_choice": "clock"}, "'none' or one of the tools: weather"),
        ({"reasoning": 0}, "reasoning: expected a word or a positive number of tokens"),
        ({"reasoning": "furious"}, "reasoning: "),
        ({"cache": "always"}, "cache: "),
    ],
)
def test_options_about_tools_are_checked(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(LLMInvalidRequestError) as caught:
        read_options({}, options)  # type: ignore[arg-type]  # what a type checker would refuse
    assert complaint in str(caught.value)


def test_no_tools_are_as_if_none_were_asked_for() -> None:
    assert read_options({}, {"tools": []}).tools is None
