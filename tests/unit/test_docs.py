"""All that docs/ says of the code is there, and what README.md links is too."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import fedpeft
from fedpeft.config import Config
from support.guides import GUIDES, ROOT

MAPPED = ("strategies", "clients", "simulations")
PAGE = (ROOT / "docs" / "how_a_round_works.md").read_text()
HOPS = re.findall(r"^\| \d+ \| `([\w/.]+)` `([\w.]+)` \|", PAGE, flags=re.M)

PAGES = [*GUIDES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "REPRODUCIBILITY", "SECURITY", "AGENTS"))]
WORDS = (
    "cohort",
    "body",
    "head",
    "stream",
    "sums",
    "refactored",
    "ledger",
    "quorum",
    "SecAgg+",
    "policy",
    "LDA",
    "NCM",
    "RanPAC",
    "Poisson batches",
    "fleet",
    "control port",
    "SuperNode",
    "SuperLink",
    "round",
    "site",
    "adapter",
    "client half",
    "role",
    "release",
    "quarantine",
)


@pytest.fixture(scope="module")
def make():
    """docs/make.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(("file", "name"), HOPS)
def test_every_hop_of_the_walk_is_where_the_page_says(file, name):
    assert name in defined(ROOT / file)


def test_the_walk_is_short():
    assert len(HOPS) == len(re.findall(r"^\| \d+ \|", PAGE, flags=re.M))  # none is passed over
    assert 20 < len(HOPS) <= 30 and len({file for file, _ in HOPS}) <= 16


def test_the_pages_are_linked():
    readme, contributing = ((ROOT / page).read_text() for page in ("README.md", "CONTRIBUTING.md"))
    assert all(f"docs/{path.name}" in readme for path in (ROOT / "docs").glob("*.md"))
    assert all(f"docs/{page}.md" in contributing for page in ("how_a_round_works", "architecture"))


def anchors(path: Path) -> set[str]:
    """A page's headings as GitHub links them; a comment of a shell block is none."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            page = (path.parent / file).resolve() if file else path
            assert page.is_file(), target
            assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_that_a_page_names_is_there(path):
    tops = "tests|docs|fedpeft|strategies|clients|simulations"
    named = set(re.findall(rf"`((?:{tops})/[\w/.]+\.(?:py|md|yaml|svg))", path.read_text()))
    examples = {name for name in named if name.endswith(("/foo.py", "/l2_pull.py"))}  # that CONTRIBUTING writes
    assert [name for name in sorted(named - examples) if not (ROOT / name).is_file()] == []


def test_every_registered_method_is_in_its_table(make):
    page = make.METHODS.read_text()
    shown = set(re.findall(r"<!-- table (\w+) -->", page))
    assert shown == set(make.catalogue.TABLES) - {"sections"} | {
        "own_adapters",
        "companions",
        "peft_refused",
        "optimizers_refused",
    }
    assert make.with_tables(page) == page, "python docs/make.py writes the tables of docs/methods.md anew"


def test_what_show_says_of_every_method_is_written_down(make):
    assert make.described() == make.catalogue.DESCRIBED.read_text(), "python docs/make.py writes it anew"


def test_every_body_says_whether_a_federation_can_run_it(make):
    page = make.CONTINUAL.read_text()
    assert make.with_tables(page) == page, "python docs/make.py writes the table of docs/continual.md anew"
    rows = dict(re.findall(r"^\| `(\w+)` \| (yes|no) \|", page, flags=re.M))
    assert set(rows) == set(make.registry.names("bodies")) and set(rows.values()) == {"yes", "no"}


def test_every_key_of_a_config_is_in_its_table(make):
    page = make.KEYS.read_text()
    assert make.with_tables(page) == page, "python docs/make.py writes the tables of docs/keys.md anew"
    shown = re.findall(r"^\| `([\w.]+)` \|", page, flags=re.M)
    assert set(shown) == set(leaves(dataclasses.asdict(Config()))) and len(shown) > 100


def leaves(tree, before=""):
    """The dotted keys of a config's tree; options of a method are one."""
    for key, value in tree.items():
        path = f"{before}{key}"
        inner = isinstance(value, dict) and (not before or path in ("data.partition", "evaluation.generate"))
        yield from leaves(value, f"{path}.") if inner else [path]


def test_every_name_that_fedpeft_offers_is_documented():
    page = (ROOT / "docs" / "api.rst").read_text()
    shown = re.findall(r"^\.\. auto\w+:: fedpeft\.(\w+)$", page, flags=re.M)
    assert set(shown) == set(fedpeft.__all__) and len(shown) == len(set(shown))
    for name in fedpeft.__all__:
        assert len(inspect.getdoc(getattr(fedpeft, name)) or "") > 30, name
    for path in re.findall(r"^\.\. auto\w+:: (fedpeft\.\w+\..*)$", page, flags=re.M):
        module, _, name = path.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), name)), path


def test_keys_of_other_tools_are_in_their_table(make):
    page = make.COMMANDS.read_text()
    assert make.with_tables(page) == page, "python docs/make.py writes the table of docs/commands.md anew"
    assert page.count("| transformers |") > 15


def test_a_method_that_is_not_in_the_tables_is_noticed(make, monkeypatch):
    table, page = make.registry.table, make.METHODS.read_text()
    monkeypatch.setattr(
        make.registry,
        "table",
        lambda kind: {**table(kind), **({"nearest": table("heads")["ncm"]} if kind == "heads" else {})},
    )
    assert "| `nearest` |" in make.with_tables(page) and "`nearest`" not in page


def test_the_figure_shows_what_was_measured(make, tmp_path):
    make.draw(tmp_path / "new.svg")
    labels = [re.findall(r"[\d.]+ ± [\d.]+", path.read_text()) for path in (tmp_path / "new.svg", make.FIGURE)]
    assert labels[0] == labels[1] and len(labels[0]) == 2 * len(make.BODIES)
    measured = make.MEASURED.read_text()
    assert all(label in measured for label in labels[1])


def test_the_figure_of_many_sites_has_every_row_of_its_table(make, tmp_path):
    make.draw_sites(tmp_path / "new.svg")
    assert (tmp_path / "new.svg").read_text().count("<path") == make.SITES.read_text().count("<path")
    found = make.many_sites()
    assert found["round"][0] == 1 and found["round"][-1] == 50 and set(found["answered"]) == {1000}
    assert max(found["seconds"]) < 60


def test_the_words_are_explained():
    rows = re.findall(r"^\| ([^|]+) \| (.{15,}) \|$", (ROOT / "docs" / "glossary.md").read_text(), flags=re.M)
    words = [word for word, _ in rows]
    assert set(WORDS) <= set(words) and len(set(words)) == len(words)
    assert words == sorted(words, key=str.lower)


def test_the_order_of_imports_is_the_one_that_is_held():
    tree = ast.parse((ROOT / "tests" / "unit" / "test_imports.py").read_text())
    (held,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "LAYERS")
    order = (ROOT / "docs" / "architecture.md").read_text().partition("**Imports go one way**")[2].partition(".\n")[0]
    told = [set(names.split(", ")) for names in re.findall(r"`([\w, ]+)`", order)]
    assert told == [names - {"simulations.benchmarks"} for names in ast.literal_eval(held)]


def test_every_folder_of_the_architecture_is_there_and_every_folder_is_in_it():
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    package = {path.name for path in (ROOT / "fedpeft").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert package <= set(re.findall(r"^  (\w+)/", tree, flags=re.M))
    for folder in MAPPED:
        inner = {path.name for path in (ROOT / folder).iterdir() if (path / "__init__.py").exists()}
        assert all(f"{name}/" in tree for name in inner)
    for name in re.findall(r"\b(\w+\.py)\b", tree):
        found = [path for top in ("fedpeft", *MAPPED) for path in (ROOT / top).rglob(name)]
        assert found, name
