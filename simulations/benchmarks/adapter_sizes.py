"""How many values a client sends for a layer, as a formula of the layer's shape and the adapter's options.

Nobody writes it down: values are counted at layers of several shapes [out, in] and at other options, the shortest sum
of products that gives every count is the formula, and it stands where it also gives the counts of other shapes and
options, that it was not made of. What no such sum gives has none (LoKr's factors of a width, what keeps a share of
entries).

    i, o             inputs and outputs of the layer
    m                the smaller of them
    ceil(m / r)      likewise of other options
    names            options that the count hangs on, found by trying

>>> shapes = [{"i": i, "o": o, "r": r} for i, o, r in ((4, 6, 2), (6, 4, 2), (8, 4, 2), (4, 4, 1), (8, 8, 3))]
>>> write_formula(fit(["r"], [(at, at["r"] * (at["i"] + at["o"])) for at in shapes]))
'r (i + o)'
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations, combinations_with_replacement, permutations
from typing import Any

import numpy as np
import torch
import transformers

from fedpeft import registry
from fedpeft.adapters import peft_types
from fedpeft.adapters.adapted import adapt
from fedpeft.adapters.peft_measure import find_layers
from fedpeft.config import AdapterConfig
from fedpeft.config.schema import options_of
from fedpeft.errors import InputError
from fedpeft.models.base import Base

SHAPES = ((64, 128), (128, 64), (192, 64), (128, 192), (192, 192))  # (i, o)
OTHERS = ((64, 192), (256, 128), (192, 128))
MOST_TERMS, FEW, LARGEST = 3, 25, 20  # of a formula: how many, one more of few products, and how large a factor
FIXED = {"LN_TUNING", "TRAINABLE_TOKENS"}  # their layers are square: i = o = width
Values = dict[str, int]  # of i, o and the options
Formula = dict[tuple[str, ...], Fraction]  # by what is multiplied
Make = Callable[[Values], AdapterConfig]


def find_formula(make: Make, roles: Sequence[str], options: Values, square: bool = False) -> str | None:
    """The formula of an adapter's values for a layer; None where there is none.

    Args:
        make: the section `adapter` of these options.
        roles: of what trains and is sent.
        options: whole numbers that it has, with a value that they can have.
        square: its layers are as wide as the model.
    """
    shapes, others = ([(i, i) for i, _ in group] if square else group for group in (SHAPES, OTHERS))
    sizes = [key for key in options if _try_others(make, roles, options, key, shapes[0])]
    counts = [_count(make, roles, options, shape, 1) for shape in shapes]
    for key in sizes:
        for shape in shapes[:2]:
            counts += _try_others(make, roles, options, key, shape)
    if None in counts:
        return None
    found = fit(sizes, [count for count in counts if count is not None])
    checked = [_count(make, roles, options, shape, layers) for shape in others for layers in (1, 2)]
    for key in sizes:
        checked += _try_others(make, roles, options, key, others[0])
    whole = _is_of_whole_model(make, roles, options, shapes[0])
    if found is None or any(count is None or evaluate(found, count[0]) != count[1] for count in checked if not whole):
        return None
    text = write_formula(found).replace("min(i, o)", "i" if square else "min(i, o)")
    return text + (" for all layers together" if whole else "")


def _is_of_whole_model(make: Make, roles: Sequence[str], options: Values, shape: tuple[int, int]) -> bool:
    one, two = (_count_values(make, roles, options, shape, layers)[0] for layers in (1, 2))
    return one == two


def _try_others(
    make: Make, roles: Sequence[str], options: Values, key: str, shape: tuple[int, int]
) -> list[tuple[Values, Fraction] | None]:
    """Counts at other values of an option; none where they are all the same."""
    usual = _count(make, roles, options, shape, 1)
    tried = [2 * options[key], options[key] // 2, 3 * options[key] // 2]
    counts = [_count(make, roles, {**options, key: value}, shape, 1) for value in tried if value]
    known = [count for count in counts if count is not None]
    return [*known] if usual is not None and any(count[1] != usual[1] for count in known) else []


def _count(
    make: Make, roles: Sequence[str], options: Values, shape: tuple[int, int], layers: int
) -> tuple[Values, Fraction] | None:
    """Values for a layer of this shape, and what they may hang on; None where the adapter cannot be had so."""
    try:
        values, number = _count_values(make, roles, options, shape, layers)
    except InputError:
        return None
    return {**options, "i": shape[0], "o": shape[1]}, Fraction(values, number)


def _count_values(
    make: Make, roles: Sequence[str], options: Values, shape: tuple[int, int], layers: int
) -> tuple[int, int]:
    """Values in all, and adapted layers."""
    model = adapt(make_base(shape, layers), make(options), 0)
    return model.form.select(roles).parameters, len(find_layers(model))


def make_base(shape: tuple[int, int], blocks: int) -> Base:
    """An encoder of so many blocks, whose `intermediate.dense` has this shape (in, out)."""
    sizes = {"hidden_size": shape[0], "intermediate_size": shape[1], "num_hidden_layers": blocks}
    config = transformers.BertConfig(vocab_size=64, num_attention_heads=2, max_position_embeddings=8, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = transformers.BertModel(config, add_pooling_layer=False)
    return Base(net, lambda inputs: net(**inputs).last_hidden_state, {}, None, "", "sequence-classification")


def formula_of_own(name: str, choices: dict[str, Any], roles: Sequence[str]) -> str | None:
    """Of an adapter of ours with these options."""
    cls = registry.load("adapters", name)
    whole = {key: item.default for key, item in options_of(cls).items() if type(item.default) is int}

    def make(options: Values) -> AdapterConfig:
        own = {key: value for key, value in options.items() if key != "r"}
        return AdapterConfig(
            name=name,
            r=options["r"],
            alpha=float(options["r"]),
            train_head=False,
            target_modules=["intermediate.dense"],
            options={**own, **choices},
        )

    return find_formula(make, roles, {"r": 4, **whole})


def formula_of_type(name: str, choices: dict[str, Any]) -> str | None:
    """Of a type of peft's with these options."""
    settings = peft_types.config_class(name)()
    chosen = {key: choices.get(key, getattr(settings, key, None)) for key in peft_types.options_of_type(name)}
    whole = {key: value for key, value in chosen.items() if type(value) is int and value > 0}

    def make(options: Values) -> AdapterConfig:
        changed = {key: value for key, value in options.items() if value != whole[key] or key in choices}
        targets = None if name in FIXED else ["intermediate.dense"]
        own = {"type": name, "options": {**choices, **changed}}
        return AdapterConfig(name="peft", train_head=False, target_modules=targets, options=own)

    return find_formula(make, ("peft",), whole, name in FIXED)


# The sum of products --------------------------------------------------------------------------------------------------


def fit(sizes: Sequence[str], counts: Sequence[tuple[Values, Fraction | int]]) -> Formula | None:
    """The sum of the fewest products of i, o, m and the sizes that gives all counts; of as few, the first in the order
    of `_list_products`. None where none does.
    """
    products = _list_products(sizes)
    table = np.array([[_multiply(product, at) for product in products] for at, _ in counts], dtype=float)
    wanted = np.array([float(count) for _, count in counts])
    for terms in range(1, MOST_TERMS + 1 + (len(products) < FEW)):
        for chosen in combinations(range(len(products)), terms):
            columns = table[:, chosen]
            factors = np.linalg.lstsq(columns, wanted, rcond=None)[0]
            halves = np.round(2 * factors) / 2
            if (np.abs(halves) > LARGEST).any() or not halves.all() or not np.allclose(columns @ halves, wanted, 1e-9):
                continue
            return {products[place]: Fraction(half) for place, half in zip(chosen, halves, strict=True)}
    return None


def _list_products(sizes: Sequence[str]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [(), *((one,) for one in (*sizes, "m", "i", "o"))]
    found += combinations_with_replacement((*sizes, "i", "o"), 2)
    found += [("m", "i"), ("m", "o"), *((size, "m") for size in sizes)]
    for size in sizes:
        found += [("i", "o", f"/{size}"), (f"ceil(m / {size})", size), (f"ceil(m / {size})", "m")]
    for one, other in permutations(sizes, 2):
        found += [(one, one, other), (one, "i", f"/{other}"), (one, "o", f"/{other}")]
    return found


def _multiply(product: tuple[str, ...], at: Values) -> Fraction:
    value, smaller = Fraction(1), min(at["i"], at["o"])
    for part in product:
        if part.startswith("ceil"):
            value *= math.ceil(smaller / at[part[len("ceil(m / ") : -1]])
        elif part.startswith("/"):
            value /= at[part[1:]]
        else:
            value *= smaller if part == "m" else at[part]
    return value


def evaluate(formula: Formula, at: Values) -> Fraction:
    """What it comes to."""
    return sum((factor * _multiply(product, at) for product, factor in formula.items()), Fraction(0))


def write_formula(formula: Formula) -> str:
    """As people write it: what all products have in common in front of a bracket."""
    common = next((part for part in next(iter(formula), ()) if all(part in product for product in formula)), None)
    factor = min(map(abs, formula.values()))
    if len(formula) == 1 or any((value / factor).denominator > 1 for value in formula.values()):
        common, factor = (common, Fraction(1)) if len(formula) > 1 else (None, Fraction(1))
    terms = []
    for product, value in sorted(formula.items(), key=lambda item: (item[1] < 0, -len(item[0]))):
        parts = list(product)
        if common is not None:
            parts.remove(common)
        terms.append(("- " if value < 0 else "+ ") + _write_product(parts, abs(value / factor)))
    total = " ".join(terms).removeprefix("+ ")
    before = _write_product([] if common is None else [common], factor)
    return total if before == "1" else f"{before} ({total})"


def _write_product(parts: Sequence[str], factor: Fraction) -> str:
    named = ["min(i, o)" if part == "m" else part.replace("(m ", "(min(i, o) ") for part in parts]
    above = [f"{part}^{count}" if count > 1 else part for part, count in Counter(named).items() if part[0] != "/"]
    below = [f"/ {part[1:]}" for part in named if part[0] == "/"]
    return " ".join([*([str(factor)] if factor != 1 or not named else []), *above, *below])
