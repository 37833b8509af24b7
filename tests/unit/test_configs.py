"""Every shipped config is valid, says how to launch and override it, and what it says is true; likewise the guides."""

from __future__ import annotations

import re
import shlex

import pytest

from fedpeft import config as configs
from support.guides import GUIDES, ROOT

SHIPPED = configs.shipped_configs()
COMMAND = re.compile(r"fedpeft simulate ([^#\n(`]+)")


def commands(text: str) -> list[list[str]]:
    """Arguments of each `fedpeft simulate` line, without --out."""
    found = []
    for match in COMMAND.finditer(text):
        words = shlex.split(match[1])
        if "--out" in words:
            del words[words.index("--out") : words.index("--out") + 2]
        found.append(words)
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_valid_and_its_header_works(name):
    text = SHIPPED[name].read_text()
    header = [line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#")]
    assert len(header[0]) > 20
    lines = commands("\n".join(header))
    assert [name] in lines, "the header does not say how to launch it"
    assert any(len(words) > 1 for words in lines), "the header does not show an override"
    plain = configs.to_tree(configs.load(name))
    for words in lines:
        changed = configs.to_tree(configs.load(words[0], words[1:]))
        assert (changed != plain) == (len(words) > 1), words


def test_commands_of_the_guides_are_valid():
    guides = [guide for guide in GUIDES if guide.name != "own_strategy.md"]  # whose package its own test installs
    text = "\n".join(guide.read_text() for guide in guides)
    lines = commands(re.sub(r"simulate (CONFIG \[key=value \.\.\.\]|NAME)", "simulate quickstart", text))
    assert len(lines) >= 16
    for words in lines:
        if words[0] != "wards.yaml":  # which a guide writes first: test_guides does too
            configs.load(words[0], [word for word in words[1:] if "=" in word])
    assert configs.load("quickstart", ["strategy.name=lora_fair"]).strategy.name == "lora_fair"


def test_every_strategy_of_the_table_is_registered():
    from fedpeft import registry

    table = (ROOT / "docs" / "methods.md").read_text().partition("## Which strategy")[2].partition("##")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    rules = {name for name in registry.names("strategies") if not registry.load("strategies", name).wraps}
    assert set(named) == rules - {"flower"}
    for name in named:
        sums = re.search(rf"^\| `{name}` \|.*\| ([\w ]+) \|$", table, re.MULTILINE)[1] == "sums"
        assert sums == (registry.load("strategies", name).needs.value == "sum"), name
