"""Text that came from elsewhere (a client, a server, a file that somebody edits): bounded before it is parsed.

read_yaml, read_json   plain data of bounded length, depth and numbers; YAML has no aliases and no tags
shown                  one line of at most 2 kB for logs, terminals and reports, control characters escaped

>>> shown("a" + chr(27) + "[31mb")
'a\\\\x1b[31mb'
>>> read_yaml("run: {rounds: 3, deadline_s: 1e2}", "config")
{'run': {'rounds': 3, 'deadline_s': 100.0}}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from fedpeft.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # of a client, a run: good as a file's on every system
TEXT_BYTES = 2048
YAML_BYTES = 64 * 1024
DEPTH = 16
LARGEST_INT = 2**63
_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")  # YAML 1.1 takes 1e-5 for a text


class BadMessage(ValueError):
    """What somebody else sent may not be used, with the reason: one line of at most 2 kB."""

    def __init__(self, reason: object) -> None:
        super().__init__(shown(reason))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as configs have it: 1e-5 is a number, a date is a text, and no key stands twice."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise ValueError(f"the key {key} stands twice")
            seen.add(key)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def read_yaml(text: str, what: str, longest: int = YAML_BYTES) -> Any:
    """Plain data from YAML.

    Args:
        what: the key or file to blame.
        longest: bytes.

    Raises:
        InputError: too long, too deep, with aliases or tags, or no YAML.
    """
    require_length(text, what, longest)
    try:
        _require_plain(text)
        tree = yaml.load(text, Loader=_Loader)
        require_plain(tree)
    except Exception as error:  # PyYAML raises ValueError and others beside its own
        raise InputError(f"{what}: not readable as YAML: {shown(error)}") from error
    return tree


def read_json(text: str, what: str, longest: int) -> Any:
    """Plain data from JSON, without NaN and Infinity.

    Args:
        longest: bytes.

    Raises:
        InputError: too long, too deep, or no JSON.
    """
    require_length(text, what, longest)
    try:
        tree = json.loads(text, parse_constant=_no_constant, parse_float=_read_float)
        require_plain(tree)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: not readable as JSON: {shown(error)}") from error
    return tree


def require_plain(tree: Any, depth: int = DEPTH) -> None:
    """Raise ValueError unless the data nest at most `depth` deep, keys are texts, and integers have 64 bits."""
    if isinstance(tree, dict | list):
        if depth == 0:
            raise ValueError(f"it nests deeper than {DEPTH}")
        for value in tree.values() if isinstance(tree, dict) else tree:
            require_plain(value, depth - 1)
    if isinstance(tree, dict) and not all(isinstance(key, str) for key in tree):
        raise ValueError("a key is no text")
    if isinstance(tree, int) and abs(tree) > LARGEST_INT:
        raise ValueError("an integer has more than 64 bits")


def shown(text: object, longest: int = TEXT_BYTES) -> str:
    """One line of at most `longest` bytes with control characters escaped; a long text loses its middle, and says so.

    What the line is put into (HTML, a terminal's markup) has escapes of its own.
    """
    whole = str(text)
    # Cut before it is escaped: a text from elsewhere may have gigabytes.
    line = _escape_text(whole[: longest + 1])
    if len(whole) <= longest and len(line.encode()) <= longest:
        return line
    note = f" ... ({len(whole)} characters) ... "
    room = longest - len(note)
    head, tail = line.encode()[: room * 3 // 4], _escape_text(whole[-longest:]).encode()[-(room // 4) :]
    return head.decode(errors="ignore") + note + tail.decode(errors="ignore")


def _escape_text(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def require_length(text: str, what: str, longest: int) -> None:
    """Raise InputError for a text of more bytes than `longest`; `what` is blamed."""
    # Characters first, so that no copy is made of a text that is far too long.
    if len(text) > longest or len(text.encode(errors="replace")) > longest:
        raise InputError(f"{what}: {len(text)} characters; at most {longest} bytes are read.")


def _require_plain(text: str) -> None:
    """Raise ValueError if YAML has aliases, anchors or tags, or nests too deep; nothing is built for that."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError("it has an anchor or an alias (& or *); write the value out")
        if getattr(event, "tag", None):
            raise ValueError(f"it has a tag ({event.tag}); only plain values are read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError(f"it nests deeper than {DEPTH}")


def _read_float(text: str) -> float:
    """Python reads 1e999 as infinity, without a word."""
    return value if math.isfinite(value := float(text)) else _no_constant(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
