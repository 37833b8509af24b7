"""make.py fills docs/: tables of methods, continual, commands and keys from the code, and two figures; and what
`fedpeft show` says of every method (`fedpeft/assets/methods.json`).

    python docs/make.py

The tables come from the registry, the figures' numbers from tables in REPRODUCIBILITY.md and from nowhere else.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fedpeft import registry
from fedpeft.adapters.averages import read_own
from fedpeft.adapters.peft_types import CANNOT
from fedpeft.adapters.peft_types import read_measured as measured_types
from fedpeft.cli import adapter_facts, catalogue
from fedpeft.config import Config, ContinualConfig, default_of
from fedpeft.config.option import INFINITY
from fedpeft.other_names import OTHERS, REFUSED, VALUES
from fedpeft.strategies.sequence.build import make_body
from fedpeft.strategies.sequence.general import GeneralServerBody

ROOT = Path(__file__).parents[1]
METHODS, CONTINUAL, COMMANDS, KEYS = (ROOT / f"docs/{page}.md" for page in ("methods", "continual", "commands", "keys"))
MEASURED, FIGURE = ROOT / "REPRODUCIBILITY.md", ROOT / "docs/figures/wordnet.svg"
SITES = ROOT / "docs/figures/sites.svg"
BODIES = {
    "frozen": "MiniLM as it is",
    "sequential:form=lora": "one LoRA, trained on",
    "merging:method=opcm": "a LoRA a task, merged (OPCM)",
    "olora": "O-LoRA",
    "inflora": "InfLoRA",
    "coso:side=in,refresh=2,eps_th=0.9": "CoSO",
    "er:form=lora": "replay of old records",
    "conpet_static": "ConPET, keeps all records",
}
HEADS = {"linear": ("trained classifier", "#b0543c"), "lda": ("LDA on the features", "#2f6d9e")}


def table(kind: str) -> str:
    """All entries of a registry table as Markdown: name, first line of its description, and paper where any has one."""
    entries = catalogue.entries(kind)[kind]
    papers = [
        getattr(registry.load(kind, entry["name"]), "paper", "") if kind in registry.TABLES else "" for entry in entries
    ]
    rows = [
        ["name", "what it is", "paper"],
        ["---"] * 3,
        *([f"`{entry['name']}`", entry["summary"], paper] for entry, paper in zip(entries, papers, strict=True)),
    ]
    return "\n".join(f"| {' | '.join(row if any(papers) else row[:2])} |".replace("  ", " ") for row in rows)


def federations() -> str:
    """All bodies as Markdown: whether a federation has them, also under sample-level DP, and how or why not."""
    rows = [["body", "federates", "under sample-level DP", "how, or why not"], ["---"] * 4]
    for name in registry.names("bodies"):
        central = registry.load("bodies", name)
        if central.stays_central:
            rows.append([f"`{name}`", "no", "", f"It {central.stays_central}."])
            continue
        half = make_body(ContinualConfig(body=name))
        how = (inspect.getdoc(central if type(half) is GeneralServerBody else type(half)) or "").splitlines()[0]
        how += " Clients send sums over their records before a task." * bool(half.sketches)
        how += " Clients replay their own earlier records." * half.replays
        private = not (half.sketches or half.replays)
        otherwise = half.without_sketches if half.without_sketches.startswith("Set ") else "no"
        rows.append([f"`{name}`", "yes", "yes" if private else otherwise, how])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def own_adapters() -> str:
    """What was measured of our own adapters as Markdown."""
    return _measured_rows("adapter", [(row["name"], row) for row in read_own()])


def tuners() -> str:
    """What was measured of peft's tuners as Markdown."""
    return _measured_rows("type", [(row["type"], row) for row in measured_types()])


def _measured_rows(kind: str, rows: list[tuple[str, dict[str, Any]]]) -> str:
    cells = [(name, adapter_facts.write_cells(row)) for name, row in rows]
    heads = list(cells[0][1])
    lines = [[kind, *heads], ["---"] * (1 + len(heads))]
    for name, of in cells:
        marked = {key: f"`{of[key]}`" if of[key] else "" for key in ("options", "a layer sends")}
        lines.append([f"`{name}`", *(of | marked).values()])
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)


def companions() -> str:
    """What adapters go with, as Markdown: a row for each answer of the checks, with all who have it."""
    found: dict[str, list[str]] = {}
    for key, about in catalogue.describe_all().items():
        table, _, name = key.partition("/")
        if "works_with" in about:
            whose = "peft's " * (table == "tuners" and name in registry.names("adapters"))
            found.setdefault(json.dumps(about["works_with"]), []).append(f"{whose}`{name}`")
    heads = list(json.loads(next(iter(found))))
    rows = [["adapters", *heads], ["---"] * (1 + len(heads))]
    for text, names in found.items():
        rows.append([", ".join(names), *(", ".join(each) or "none" for each in json.loads(text).values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def peft_refused() -> str:
    """Why the others of peft's tuners cannot be had, as Markdown."""
    rows = [["type", "cannot be had, since"], ["---"] * 2, *([f"`{name}`", why] for name, why in CANNOT.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def optimizers_refused() -> str:
    """Why some published optimizers cannot be had, as Markdown."""
    rows = [["name", "cannot be had, since"], ["---"] * 2]
    rows += [[f"`{name}`", why] for name, why in REFUSED["client.optimizer"].items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def other_names(table: dict[str, tuple[str, str, str]]) -> str:
    """Keys, or values, of other tools as Markdown, beside ours."""
    rows = [["theirs", "whose", "ours", "mind"], ["---"] * 4]
    rows += [[f"`{name}`", whose, ours and f"`{ours}`", note] for name, (whose, ours, note) in table.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def keys() -> str:
    """Every key of a config as Markdown, a table for each section."""
    return "\n\n".join(_section(item.name, item.default_factory) for item in dataclasses.fields(Config))


def _section(name: str, section: Any) -> str:
    rows = [["key", "default", "values", "meaning"], ["---"] * 4]
    about = (inspect.getdoc(section) or "").partition(": ")[2]
    nested = ""
    for item in dataclasses.fields(section):
        if "help" not in item.metadata:
            nested += "\n\n" + _section(f"{name}.{item.name}", item.default_factory)
            continue
        default = json.dumps(default_of(item), ensure_ascii=False)
        meaning = item.metadata["help"].replace("|", r"\|")
        rows.append([f"`{name}.{item.name}`", f"`{default}`", _allowed(item.metadata), meaning])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## `{name}`\n\n" + (f"{about[0].upper()}{about[1:]}\n\n" if about else "") + table + nested


def _allowed(meta: Mapping[str, Any]) -> str:
    if meta["table"]:
        return f"`fedpeft list {meta['table']}`"
    if meta["choices"]:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    bounds = (("≥", meta["low"]), (">", meta["above"]), ("≤", meta["high"]))
    return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if abs(bound) < INFINITY)


def described() -> str:
    """What `fedpeft show` says of every entry of the registry, as JSON."""
    return json.dumps(catalogue.describe_all(), indent=1, ensure_ascii=False) + "\n"


def with_tables(page: str) -> str:
    """The page with every block between `<!-- table KIND -->` and `<!-- end -->` made anew."""

    def fill(block: re.Match[str]) -> str:
        made = MADE[block[2]]() if block[2] in MADE else table(block[2])
        return f"{block[1]}{made}\n"

    return re.sub(r"(<!-- table (\w+) -->\n).*?(?=<!-- end -->)", fill, page, flags=re.DOTALL)


MADE = {
    "federations": federations,
    "keys": keys,
    "optimizers_refused": optimizers_refused,
    "other_names": partial(other_names, OTHERS),
    "other_values": partial(other_names, VALUES),
    "own_adapters": own_adapters,
    "companions": companions,
    "tuners": tuners,
    "peft_refused": peft_refused,
}


def measured() -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over seeds, in %, by body and head, as REPRODUCIBILITY.md has them for `wordnet`."""
    section = MEASURED.read_text().partition("\n### wordnet")[2].split("\n\n")[1]
    header, _, *rows = (line.strip("| ").split(" | ") for line in section.splitlines())
    cells = {row[0].strip("`"): dict(zip(header, row, strict=True)) for row in rows}
    numbers = {name: {head: cells[name][head].split(" ± ") for head in HEADS} for name in BODIES}
    return {name: {head: (float(mean), float(sd)) for head, (mean, sd) in row.items()} for name, row in numbers.items()}


def draw(path: Path) -> None:
    """A dot and its error bar for each body and head."""
    with drawing(path, (7.6, 4.2)) as figure:
        axes = figure.subplots()
        for place, row in enumerate(reversed(measured().values())):
            axes.axhline(place, color="#e4e4e4", linewidth=0.8, zorder=0)
            for head, (mean, sd) in row.items():
                color, shift = HEADS[head][1], 0.18 if head == "lda" else -0.18
                axes.errorbar(mean, place + shift, xerr=sd, fmt="o", color=color, capsize=3, markersize=5)
                axes.text(66, place + shift, f"{mean:.1f} ± {sd:.1f}", color=color, va="center", ha="right", fontsize=8)
        axes.set_yticks(range(len(BODIES)), list(reversed(BODIES.values())))
        axes.set_xlim(25, 66)
        axes.set_xlabel("accuracy in % on 700 test texts, mean ± sd of 3 seeds")
        axes.tick_params(left=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        for label, color in HEADS.values():
            axes.plot([], [], "o", color=color, label=label)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)


def many_sites() -> dict[str, list[float]]:
    """The columns of the rounds with 1,000 sites, as REPRODUCIBILITY.md has them."""
    section = MEASURED.read_text().partition("\n## Many sites")[2].split("\n\n")
    header, _, *rows = next(part for part in section if part.startswith("| round")).splitlines()
    names, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows))
    return {name: [float(row[place]) for row in cells] for place, name in enumerate(names)}


def draw_sites(path: Path) -> None:
    """Seconds, and memory of the coordinator's processes, of every round."""
    found = many_sites()
    with drawing(path, (7.6, 2.9)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(found["round"], found["seconds"], color="#2f6d9e", label="seconds")
        left.plot(found["round"], found["CPU s"], color="#b0543c", label="CPU seconds of the coordinator")
        sizes = [name for name in found if name.endswith(" MB")]
        for name, color in zip(sizes, ("#2f6d9e", "#b0543c", "#6b8e3d"), strict=False):
            right.plot(found["round"], found[name], color=color, label=f"{name.removesuffix(' MB')} (MB)")
        for axes in (left, right):
            axes.set_ylim(0)
            axes.set_xlabel("round")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)


@contextmanager
def drawing(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure that is saved at the end, the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "fedpeft", "font.family": "sans-serif", "font.size": 10}
    with pyplot.rc_context(settings):
        figure = pyplot.figure(figsize=size, layout="constrained")
        yield figure
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    for page in (METHODS, CONTINUAL, COMMANDS, KEYS):
        page.write_text(with_tables(page.read_text()))
    catalogue.DESCRIBED.write_text(described())
    draw(FIGURE)
    draw_sites(SITES)
