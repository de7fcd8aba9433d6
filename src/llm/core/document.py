"""YAML text, read with suspicion: plain values out, or one sentence that names the line.

PyYAML's constructors are not used for collections: they keep the last of two equal keys, expand aliases, and turn
``2023-06-01`` into a date. Here a document is composed into nodes, and the nodes are read by hand.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from .reading import DEPTH, Wrong, name

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAG + kind for kind in ("null", "bool", "int", "float"))
# A date stays the text it is in the file: `api_version: 2023-06-01` needs no quotes.
_TEXTS = frozenset(_TAG + kind for kind in ("str", "timestamp", "value"))


class _Loader(yaml.SafeLoader):
    """Composes nodes, but no anchors and no bottomless nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it out
        # An alias may double a document at every level. Its name is not repeated: it may be a key without quotes.
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise Wrong(
                f"{_place(event.start_mark)}: anchors (&) and aliases (*) are not supported: "
                f"write the value out, or put text that begins with & or * in quotes"
            )
        if self.depth > DEPTH:
            raise Wrong(f"{_place(event.start_mark)}: nested more than {DEPTH} levels deep")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def parse(text: str) -> Any:
    """Read one YAML document into dicts with text keys, lists, text, numbers, flags and None.

    Raises :class:`Wrong`, with line and column, for what is not YAML and for duplicate keys, keys that are not text,
    anchors, aliases, merge keys, foreign tags and deep nesting. The message repeats nothing of a value.
    """
    complaint: str
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _value(loader, node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # PyYAML quotes names (of handles, of anchors) that may be a key which somebody forgot to put in quotes.
        said = re.sub(r"'[\w!-]{2,}'", "'…'", error.problem or error.context or "cannot be read")
        complaint = f"{_place(mark) if mark else 'somewhere'}: not valid YAML: {said}"
        if mark and text[: mark.index].endswith("$"):
            complaint += ": between brackets, put ${…} in quotes"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0) + 1
        complaint = f"line {line}: holds a character that YAML does not allow (a control character)"
    except (ValueError, OverflowError, LookupError):
        # What Python's own conversions raise inside PyYAML's scanner, "\UFFFFFFFF" for one.
        complaint = "not valid YAML: an escape or a directive holds an impossible number"
    raise Wrong(complaint)


def _value(loader: _Loader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _mapping(loader, node)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_value(loader, child) for child in node.value]
    if isinstance(node, yaml.ScalarNode) and node.tag in _TEXTS:
        return node.value
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        if ":" in node.value:
            # YAML 1.1 reads 1:30 as ninety, and PyYAML takes minutes for a megabyte of it.
            raise Wrong(f"{_place(node.start_mark)}: a number with colons is to the base of 60: put text in quotes")
        try:
            return loader.construct_object(node)
        except (ValueError, OverflowError, LookupError):
            pass
        raise Wrong(f"{_place(node.start_mark)}: cannot be read as {node.tag.removeprefix(_TAG)}: put text in quotes")
    raise Wrong(f"{_place(node.start_mark)}: a tag or a merge key (<<) stands here: plain values only")


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        where = _place(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _TEXTS:
            raise Wrong(f"{where}: a key must be text: put it in quotes")
        key: str = key_node.value
        if key in mapping:
            raise Wrong(f"{where}: the key {name(key)} stands here again (first in line {first[key]}): remove one")
        first[key] = key_node.start_mark.line + 1
        mapping[key] = _value(loader, value_node)
    return mapping


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
