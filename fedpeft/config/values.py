"""How text becomes values: YAML and `key=value` keep scalars as they were typed, and the field says what they mean.

YAML's own rules make a truth value of the class name `no`, 1.1 of 1.10 and 750 of 12:30, so none of them is applied
where a field has a type. A quoted scalar is that text, whatever it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fedpeft.errors import InputError

NULLS = ("null", "Null", "NULL", "~")
TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# Decimal whatever it begins with: YAML 1.1 reads 010 as eight.
INTEGER = re.compile(r"[-+]?\d[\d_]*")
# Also 1e-5, which YAML 1.1 takes for a text, as it has no point.
FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.?(inf|nan)", re.IGNORECASE)
MERGE = "tag:yaml.org,2002:merge"


class Plain(str):
    """A scalar as it was typed, without quotes around it in YAML; on the command line they may still be there."""


class _ScalarLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Scalars stay text; a key that stands twice in a mapping is refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            # `<<` may stand several times: each takes in another mapping.
            if key.tag != MERGE and isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else None)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _construct_scalar(loader: _ScalarLoader, node: Any) -> str | None:
    text = str(loader.construct_scalar(node))
    if node.style is not None:
        return text
    # `key:` with nothing behind it; between quotes nothing is an empty text.
    return Plain(text) if text else None


# All others go, or 12:30 would be 750 before any field has seen it.
_ScalarLoader.yaml_implicit_resolvers = {
    "<": [entry for entry in yaml.SafeLoader.yaml_implicit_resolvers["<"] if entry[0] == MERGE]
}
_ScalarLoader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)
_ScalarLoader.add_constructor(MERGE, _construct_scalar)  # where it is no key


def read(text: str, what: str) -> Any:
    """YAML whose plain scalars are `Plain`, its quoted ones `str`, what is left empty None, its keys `str`.

    Raises:
        InputError: it cannot be read; `what` is blamed.
    """
    try:
        return _with_text_keys(yaml.load(text, Loader=_ScalarLoader))  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{what}: not readable as YAML: {error}") from error


def written(tree: dict[str, Any]) -> str:
    """YAML of a mapping."""
    from omegaconf import OmegaConf  # as in all functions here: it takes a third of the time that `fedpeft --help` has

    return OmegaConf.to_yaml(OmegaConf.create(tree))


def structure(value: Any, key: str) -> Any:
    """A list or mapping written in one line, `[a, b]` or `{a: 1}`, with its scalars as typed; all else as it is."""
    # Between quotes a text may begin with a bracket.
    if not (isinstance(value, Plain) and value.strip()[:1] in ("[", "{")):
        return value
    try:
        return read(value, key)
    except InputError as error:
        raise InputError(
            f"{key}: '{value}' is no list [a,b] and no mapping {{a: 1}}. Quote entries that hold commas, "
            f"brackets, '#' or ': '. ({str(error.__cause__).splitlines()[0]})"
        ) from error


def is_null(value: Any) -> bool:
    """Whether it is nothing: None, or the word for it without quotes."""
    return value is None or (isinstance(value, Plain) and value.strip() in NULLS)


def unquoted(value: Any) -> Any:
    """What stands between quotes that go around a whole value; other text without spaces around it."""
    if not isinstance(value, Plain):
        return value
    text = value.strip()
    # By YAML, which knows the escapes, and sees that 'a' or 'b' is no text in quotes.
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            inner = yaml.load(text, Loader=_ScalarLoader)
        except yaml.YAMLError:
            return Plain(text)
        return inner if isinstance(inner, str) else Plain(text)
    return Plain(text)


def to_annotation(value: Any, kind: str, key: str) -> Any:
    """The value as a field with the annotation `kind` has it: text as it stands, numbers and truth values read.

    Args:
        kind: str, int, float, bool or Any, list[...] or dict[str, ...] of those, perhaps `| None`.

    Raises:
        InputError: it is none; `key` is blamed.

    >>> to_annotation(Plain("1.10"), "str", "x"), to_annotation(Plain("1.10"), "float", "x")
    ('1.10', 1.1)
    >>> to_annotation(Plain("[no,01]"), "list[str]", "x")
    ['no', '01']
    """
    bases = [part.strip() for part in kind.split("|")]
    base = " | ".join(part for part in bases if part != "None")
    if is_null(value) and ("None" in bases or base == "Any"):
        return None
    whole = base.startswith(("list[", "dict["))
    found = _to_type(structure(value, key) if whole else unquoted(value), base)
    if found is None:
        shown = str(value) if isinstance(value, str) else value
        raise InputError(f"{key}: {shown!r} is not a valid {kind}.{_hint_form(base)}")
    return found


def _to_type(value: Any, base: str) -> Any:
    """The value as this type has it, or None."""
    inner = re.fullmatch(r"(list|dict)\[(?:str, ?)?(.+)\]", base)
    if inner:
        fits = isinstance(value, dict if inner[1] == "dict" else list | tuple)
        return _to_typed_entries(value, inner[2]) if fits else None
    # By the type itself, as True is an int too; a float would come back as 1.1 for 1.10.
    if base == "str":
        return str(value) if isinstance(value, str | Path) or type(value) is int else None
    if base == "bool":
        return value if isinstance(value, bool) else TRUTHS.get(str(value).lower())
    if base in ("int", "float"):
        return _to_number(value, base)
    return _guess_value(value)


def _to_typed_entries(value: Any, base: str) -> Any:
    """The list or mapping with its values as this type has them, or None where one has none."""
    if base == "Any":
        return _guess_value(value)
    found = [_to_type(entry, base) for entry in (value.values() if isinstance(value, dict) else value)]
    if any(entry is None for entry in found):
        return None
    return dict(zip(map(str, value), found, strict=True)) if isinstance(value, dict) else found


def _to_number(value: Any, base: str) -> int | float | None:
    if isinstance(value, bool):
        return None
    # Python refuses 1_ and 1__0, whole numbers of over 4,300 digits, and those that no float holds.
    with suppress(ValueError, OverflowError):
        if isinstance(value, int | float):
            return float(value) if base == "float" else value if isinstance(value, int) else None
        if isinstance(value, str) and base == "int" and INTEGER.fullmatch(value):
            return int(value)
        if isinstance(value, str) and base == "float" and FLOAT.fullmatch(value):
            return float(re.sub(r"\.(?=inf|nan)", "", value, flags=re.IGNORECASE))
    return None


def _guess_value(value: Any) -> Any:
    """A value for which no field has a type: null, true, false and numbers in decimal are those, all else is text."""
    if isinstance(value, dict):
        return {str(key): _guess_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_guess_value(entry) for entry in value]
    if not isinstance(value, Plain):
        return value
    if is_null(value):
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if re.match(r"[-+]?0\d", value):  # a number does not begin so
        return str(value)
    found = _to_number(value, "int")
    # inf, nan and 1. end in no digit: where no field asks for a number they are names.
    found = _to_number(value, "float") if found is None and value[-1:].isdigit() else found
    return str(value) if found is None else found


def _hint_form(base: str) -> str:
    return " Write [a,b]." if base.startswith("list") else " Write {a: 1}." if base.startswith("dict") else ""


def interpolated(tree: dict[str, Any], beside: dict[str, Any], foreign: bool = False) -> dict[str, Any]:
    r"""The tree with every `${...}` replaced by what it names in the tree; `\${` stands for the characters.

    Args:
        beside: values for what the tree leaves out.
        foreign: another party wrote it; an interpolation could read this machine's environment and is refused.

    Raises:
        InputError: an interpolation that names nothing, or any where it is refused.
    """
    found = [(key, text) for key, text in _find_texts(tree, "") if "${" in text]
    if not found:
        return tree
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, text in found:
        if foreign:
            raise InputError(f"{key}: '{text}' is an interpolation, which would read what belongs to this machine.")
        try:
            # Alone first, so that the key of a text that is no interpolation can be named.
            OmegaConf.create([str(text)])
        except OmegaConfBaseException as error:
            raise _refuse_unresolved(key, text, error) from error
    # Defaults too: ${adapter.r} may name a key that the file leaves out.
    whole = OmegaConf.merge(OmegaConf.create(beside), OmegaConf.create(_to_bare(tree)))
    replaced: dict[str, Any] = _resolve_node(tree, whole, "")
    return replaced


def escaped(value: Any) -> Any:
    r"""The value with `${` in its texts written so that `interpolated` gives it back."""
    if isinstance(value, dict):
        return {key: escaped(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(entry) for entry in value]
    # OmegaConf takes two backslashes before `${` for one, so those that stand there are doubled.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _resolve_node(value: Any, node: Any, key: str) -> Any:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        done = {name: _resolve_entry(entry, node, name, f"{key}.{name}".lstrip(".")) for name, entry in items}
        return done if isinstance(value, dict) else list(done.values())
    return value


def _resolve_entry(entry: Any, node: Any, name: Any, key: str) -> Any:
    # Not through OmegaConf, which would lose that it stood without quotes.
    if isinstance(entry, str) and "${" not in entry:
        return entry
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        below = node[name]
    except (OmegaConfBaseException, RecursionError) as error:
        raise _refuse_unresolved(key, entry, error) from error
    if isinstance(entry, str):
        try:
            return _to_plain(OmegaConf.to_container(below, resolve=True) if OmegaConf.is_config(below) else below)
        except (OmegaConfBaseException, RecursionError) as error:
            raise _refuse_unresolved(key, entry, error) from error
    return _resolve_node(entry, below, key)


def _refuse_unresolved(key: str, text: str, error: BaseException) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InputError(
        f"{key}: '{text}' cannot be resolved: {reason}. Name a key of this config, as ${{adapter.r}}, or "
        "write \\${ for these characters."
    )


def _to_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_to_plain(entry) for entry in value]
    # Read by its field like what is typed: ${run.seed} may stand where a text is wanted, or a number.
    return Plain(value) if isinstance(value, str) else value


def _to_bare(value: Any) -> Any:
    """Texts as OmegaConf takes them."""
    if isinstance(value, dict):
        return {str(key): _to_bare(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_bare(entry) for entry in value]
    return str(value) if isinstance(value, str | Path) else value


def _find_texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, entry in items:
            yield from _find_texts(entry, f"{key}.{name}".lstrip("."))


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _with_text_keys(entry) for key, entry in value.items()}
    return [_with_text_keys(entry) for entry in value] if isinstance(value, list) else value
