"""Texts, YAML and JSON from elsewhere: what is read, what is refused before it costs anything, what is shown."""

from __future__ import annotations

import time

import pytest

from fedpeft.errors import InputError
from fedpeft.foreign import DEPTH, TEXT_BYTES, YAML_BYTES, read_json, read_yaml, shown


def aliases(levels: int, width: int = 10) -> str:
    lines = ["a0: &a0 [x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE_YAML = {
    "aliases of aliases": aliases(9),
    "one anchor": "a: &x 1",
    "a merged alias": "a: &x {b: 1}\nc: {<<: *x}",
    "an object": "!!python/object/apply:os.system ['true']",
    "a tag of YAML's own": "a: !!binary aGFsbG8=",
    "a tag of somebody's": "a: !mine 3",
    "the tag of no tag": "a: ! 3",
    "65 kB": "a: " + "x" * YAML_BYTES,
    "65 kB in fewer characters": "a: " + "ü" * (YAML_BYTES // 2 + 1),
    "deep lists": "[" * 20_000,
    "deep lists, closed": "[" * 5000 + "]" * 5000,
    "deep mappings": "{a: " * 9000,
    "deep by indent": "\n".join(" " * n + "a:" for n in range(100)),
    "deep by dashes": "- " * 20_000 + "x",
    "a key twice": "a: 1\na: 2",
    "a key twice among many": "\n".join(f"k{n}: 1" for n in range(6000)) + "\nk5999: 2",
    "a key that is a list": "? [1, 2]\n: 3",
    "a key that is a number": "1: 2",
    "a key that is nothing": ": 2",
    "an integer of 20000 digits": "a: " + "9" * 20_000,
    "a hexadecimal one": "a: 0x" + "f" * 40_000,
    "one by sixties": "a: 1" + ":59" * 20_000,
    "two documents": "a: 1\n---\nb: 2",
    "a control character": "a: \x00",
    "half a list": "a: [1, 2",
    "a tab": "a:\n\t- b",
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_hostile_yaml_is_refused_at_once_in_a_sentence(kind):
    began = time.monotonic()
    with pytest.raises(InputError, match=r"^the config: ") as error:
        read_yaml(HOSTILE_YAML[kind], "the config")
    assert time.monotonic() - began < 1.0
    assert len(str(error.value).encode()) <= TEXT_BYTES + 100 and str(error.value).isprintable()


def test_yaml_is_read_as_configs_are():
    text = "a: 1e-5\nb: [1_000, -2.5e3, .5, 'x', yes, null, 2024-01-02]\nc: {d: {e: 0x10}}\n"
    assert read_yaml(text, "x") == {
        "a": 1e-5,
        "b": [1000, -2500.0, 0.5, "x", True, None, "2024-01-02"],
        "c": {"d": {"e": 16}},
    }
    assert read_yaml("[" * DEPTH + "]" * DEPTH, "x") is not None
    assert read_yaml("", "x") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 2000,
        "[" * 17 + "]" * 17,
        '{"a": NaN}',
        "[Infinity]",
        "9" * 5000,
        "1" + "0" * 30,
        '{"a": 1',
        " " * 4001,
        '"' + "ü" * 2001 + '"',
    ],
)
def test_hostile_json_is_refused_in_a_sentence(text):
    with pytest.raises(InputError, match=r"^the task: ") as error:
        read_json(text, "the task", 4000)
    assert len(str(error.value)) < TEXT_BYTES


def test_json_is_read():
    assert read_json('{"a": [1, 2.5, null, true]}', "x", 100) == {"a": [1, 2.5, None, True]}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain, with ümlaut and 漢字", "plain, with ümlaut and 漢字"),
        ("two\nlines\tand\r", r"two\nlines\tand\r"),
        ("\x1b[2J\x07\x00", r"\x1b[2J\x07\x00"),
        ("left‮right\u2028", r"left\u202eright\u2028"),
        ("\ud800", r"\ud800"),
        (KeyError("x"), "'x'"),
    ],
)
def test_shown_is_one_line_without_control_characters(text, line):
    assert shown(text) == line


@pytest.mark.parametrize("text", ["x" * 64_000_000, "\x00" * 5000, "漢" * 2000, "\ud800" * 1000, "a" * 2049])
def test_shown_is_at_most_two_kilobytes_and_says_that_it_is_cut(text):
    line = shown("begin " + text + " end")
    assert len(line.encode()) <= TEXT_BYTES and line.isprintable()
    assert line.startswith("begin ") and line.endswith(" end") and f"({len(text) + 10} characters)" in line


def test_json_has_no_number_that_is_read_as_infinity():
    assert read_json("[1e300, -2.5]", "x", 100) == [1e300, -2.5]
    for text in ("[1e999]", '{"a": -1e999}', "Infinity", "NaN"):
        with pytest.raises(InputError, match=r"^x: not readable as JSON: .* is no number of JSON"):
            read_json(text, "x", 100)
