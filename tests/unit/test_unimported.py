"""A config checked with torch named alone is found right or wrong as with torch, in the same words."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys

import pytest

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.config.option import INFINITY
from fedpeft.errors import InputError
from fedpeft.unimported import try_without
from support.sample import few

CHECK = """
import json, sys
from fedpeft import config as configs
from fedpeft.errors import InputError
from fedpeft.unimported import PACKAGES, Used, _stand_ins

def outcome(name, overrides):
    try:
        tree = configs.read(name, overrides)
        return [True, configs.to_yaml(configs.complete(tree))]
    except InputError as error:
        return [False, str(error)]
    except Used:
        return None

before = {*sys.modules}
with _stand_ins(PACKAGES):
    found = [outcome(*case) for case in json.load(sys.stdin)]
"""
ASKED = ("flower", "peft")  # what a name of theirs stands for is asked of flwr and of peft


def keys(config, path=""):
    """Every key of a section with the values to try it with: allowed ones, and some that are not."""
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), f"{path}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{key}.")
        elif item.name != "options":
            allowed = [*configs.schema.choices_of(item)]
            bounds = [item.metadata.get(name) for name in ("low", "high", "above")]
            numbers = [
                f"{bound + step:g}" for bound in bounds if abs(bound or INFINITY) < INFINITY for step in (-1, 0, 1)
            ]
            yield f"{key}", [*allowed, *allowed, *numbers, "null", "true", "1", "2", "0.5", "-1", "x", "[x]", "{a: 1}"]


def named_methods():
    """Sections that name a method, with every name of its table."""
    for path, section in configs.schema.METHOD_SECTIONS.items():
        yield f"{path}.{section.key}", [*registry.names(section.table), "nothing"]
    yield "strategy.wrap", [f"[{name}]" for name in registry.names("strategies")]
    yield "privacy.unit", ["sample", "client"]
    yield "client.optimizer", [*registry.names("optimizers")]
    yield "adapter.penalty", [*registry.names("penalties")]
    yield "continual.head", [*registry.names("heads")]
    yield "model.task", [*registry.names("objectives")]


def draw_cases(count):
    """Shipped configs, and shipped configs with up to three keys set to something else."""
    draw, single, methods = random.Random(20), [*keys(configs.Config())], [*named_methods()]
    shipped = [*configs.shipped_configs(), *configs.job_configs()]
    for _ in range(count):
        chosen = [draw.choice(methods) for _ in range(draw.randint(0, 2))]
        chosen += [draw.choice(single) for _ in range(draw.randint(0, 1) if chosen else 1)]
        yield draw.choice(shipped), [f"{key}={draw.choice(values)}" for key, values in dict(chosen).items()]
    yield from ((name, []) for name in shipped)


def check_whole(name, overrides):
    try:
        return [True, configs.to_yaml(configs.load(name, overrides))]
    except InputError as error:
        return [False, str(error)]


def in_process(code, given=""):
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("count", few([150, 3000], always=[150]))
def test_a_config_is_what_it_is_with_torch(count):
    cases = [*draw_cases(count)]
    printed = in_process(f"{CHECK}\nprint(json.dumps(found))", json.dumps(cases))
    found = json.loads(printed)
    for case, what in zip(cases, found, strict=True):
        if what is None:
            assert any(name in word for name in ASKED for word in (case[0], *case[1])), case
        else:
            assert what == check_whole(*case), case
    assert {what[0] for what in found if what} == {True, False} and None in found


def test_nothing_that_has_seen_a_stand_in_is_left():
    printed = in_process(
        f"""{CHECK}
print(sorted({{*sys.modules}} - before & {{name for name in sys.modules if name.startswith(("fedpeft", *PACKAGES))}}))
import fedpeft
print([name for name in ("strategies", "clients", "adapters", "state") if name in vars(fedpeft)])
import torch
from fedpeft.strategies.rules.fedit import FedIT
print(isinstance(torch.zeros(1), torch.Tensor), FedIT().aggregate.__name__)
""",
        json.dumps([["quickstart", []]]),
    )
    assert printed.splitlines() == ["[]", "[]", "True aggregate"]


@pytest.fixture
def heavy(tmp_path, monkeypatch):
    """A package that counts how often it is imported."""
    (tmp_path / "heavy.py").write_text("class Net:\n    size = 3\n\n\ndef add(a, b):\n    return a + b\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("heavy", None)


def count_calls(function):
    """The function, and a list that gets longer with each call of it."""
    calls = []

    def call():
        calls.append(function)
        return function()

    return call, calls


def subclass():
    from heavy import Net

    class Own(Net):
        own = 1

    return Own


@pytest.mark.parametrize(
    ("function", "times"),
    [
        (lambda: __import__("heavy") and 4, 2),  # its truth
        (lambda: subclass().own, 1),
        (lambda: subclass()().own, 1),
        (lambda: subclass().size + 1, 2),
        (lambda: subclass()().size + 1, 2),
        (lambda: __import__("heavy").add(1, 3), 2),
        (lambda: isinstance(2, __import__("heavy").Net) + 4, 2),
        (lambda: len({__import__("heavy").add, 1, 2, 3}), 1),
        (lambda: f"{__import__('heavy').Net.size + 1}", 2),
    ],
)
def test_a_package_is_imported_where_it_is_used(heavy, function, times):
    call, calls = count_calls(function)
    assert call() == try_without(call, ("elsewhere",)) and "heavy" in sys.modules
    del sys.modules["heavy"]
    calls.clear()
    found = try_without(call, ("heavy",))
    assert len(calls) == times and ("heavy" in sys.modules) == (times == 2)
    assert found == function()


def test_what_a_function_refuses_stands_and_other_errors_are_found_again(heavy):
    def refuse():
        from heavy import Net  # noqa: F401

        raise InputError("data.source: no")

    refused, calls = count_calls(refuse)
    with pytest.raises(InputError, match=r"data\.source: no"):
        try_without(refused, ("heavy",))
    assert len(calls) == 1
    failing, calls = count_calls(lambda: __import__("heavy").add(1, None))
    with pytest.raises(TypeError, match="NoneType"):
        try_without(failing, ("heavy",))
    assert len(calls) == 2


def test_methods_of_another_package_are_checked_with_torch(heavy, monkeypatch):
    monkeypatch.setattr(registry, "entries_of_others", lambda: {"fedpeft.strategies": ["mine"]})
    function, calls = count_calls(lambda: __import__("heavy").Net.size)
    assert try_without(function, ("heavy",)) == 3 and len(calls) == 1
