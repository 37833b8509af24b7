"""Imports go one way, methods do not know each other, and what must stay light imports nothing heavy."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft import registry

ROOT = Path(__file__).parents[2]
MAPPED = ("strategies", "clients", "simulations")  # folders beside fedpeft/ that are its sub-packages
# A module may import from its own line and the lines above. Names are modules or packages below fedpeft.
LAYERS = (
    {
        "errors",
        "extras",
        "progress",
        "seeds",
        "registry",
        "other_names",
        "config",
        "lowrank",
        "files",
        "folders",
        "foreign",
        "uncollected",
        "unimported",
    },
    {"state", "state_file", "packing", "flower"},
    {"record"},
    {"objectives", "data"},
    {"models"},
    {"adapters", "privacy"},
    {"continual", "tta", "merging"},
    {"strategies", "clients"},
    {"run"},
    {"simulations"},
    {"unlearning"},
    {"deploy"},
    {"cli", "simulations.benchmarks"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# A whole module may reach up for one thing, inside a function.
EXCEPTIONS = {("fedpeft.config.loading", "fedpeft.simulations")}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "datasets",
    "matplotlib",
    "ray",
    "flwr",
    "opacus",
    "sklearn",
    "safetensors",
    "torchmetrics",
    "tensorboard",
    "wandb",
    "mlflow",
    "bitsandbytes",
}
COSTLY = HEAVY | {"numpy", "scipy", "pandas", "pyarrow", "omegaconf", "tokenizers", "dp_accounting", "jinja2", "PIL"}
MAY_LOAD = {  # a command -> what it may load of what is costly
    "--help": set(),
    "list strategies": set(),
    "list": {"numpy"},
    "show data": {"numpy"},
    "show partitioners/iid": set(),
    "show bodies/coso": set(),
    "validate quickstart": {"numpy"},
    "validate continual": {"numpy"},
}
LIGHT = (
    "fedpeft",
    "fedpeft.errors",
    "fedpeft.extras",
    "fedpeft.seeds",
    "fedpeft.registry",
    "fedpeft.config",
    "fedpeft.record.metrics",
    "fedpeft.files",
    "fedpeft.folders",
    "fedpeft.foreign",
    "fedpeft.unimported",
    "fedpeft.cli.alive",
    "fedpeft.cli.console",
    "fedpeft.progress",
    "fedpeft.cli.catalogue",
    "fedpeft.cli.deploy",
    "fedpeft.deploy.settings",
    "fedpeft.deploy.processes",
    "fedpeft.cli.privacy",
    "fedpeft.cli.unlearning",
    "fedpeft.cli.bench",
    "fedpeft.cli.main",
)


def modules() -> dict[str, Path]:
    """Module name -> file, of everything that a wheel would hold."""
    found = {}
    for folder in ("fedpeft", *MAPPED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] == ("fedpeft", "assets"):
                continue
            parts = parts if parts[0] == "fedpeft" else ("fedpeft", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(node: ast.AST) -> list[str]:
    """Full names that one statement imports; `from a import b` gives a.b where that is a module of ours, else a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else str(node.module) for name in names]
    return []


def everywhere(name: str) -> set[str]:
    """All that a module imports, also inside functions and for type checkers."""
    return {target for node in ast.walk(ast.parse(MODULES[name].read_text())) for target in imported(node)}


def at_once(tree: ast.Module) -> Iterator[str]:
    """What runs when the module is imported: no function bodies, no TYPE_CHECKING blocks."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        yield from imported(node)
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not checking and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack.extend(ast.iter_child_nodes(node))


def layer(name: str) -> int:
    """The line of the longest part of its name that has one."""
    parts = name.split(".")[1:]
    return next(RANK[part] for end in range(len(parts), 0, -1) if (part := ".".join(parts[:end])) in RANK)


def test_every_module_has_a_layer():
    assert len(MODULES) > 50
    unplaced = {name.split(".")[1] for name in MODULES if name != "fedpeft"} - set(RANK)
    assert not unplaced, f"put these in LAYERS, and in design.md: {unplaced}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    ours = {target for target in everywhere(name) if target.split(".")[0] == "fedpeft"}
    assert not {target for target in everywhere(name) if target.split(".")[0] in MAPPED}, "bare folder imported"
    rank = len(LAYERS) if name == "fedpeft" else layer(name)  # which names what it offers, and imports it when asked
    upward = {target for target in ours - {"fedpeft"} if layer(target) > rank and (name, target) not in EXCEPTIONS}
    assert not upward


def test_modules_import_each_other_in_no_circle():
    graph = {
        name: {target for target in at_once(ast.parse(path.read_text())) if target in MODULES and target != "fedpeft"}
        for name, path in MODULES.items()
    }
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name in set(graph) - done if graph[name] <= done | {name}}
        assert free, f"circle among {sorted(set(graph) - done)}"
        done |= free


def test_the_walk_sees_what_runs_and_no_more():
    code = """
import torch
if TYPE_CHECKING:
    import ray
try:
    from peft import x
except ImportError:
    pass
class C:
    import flwr
    def f(self):
        import datasets
"""
    assert set(at_once(ast.parse(code))) == {"torch", "peft", "flwr"}


@pytest.mark.parametrize("table", ["strategies"])
def test_methods_do_not_import_each_other(table):
    methods = {entry.partition(":")[0] for entry in registry.TABLES[table].values()}
    assert len(methods) > 10 and methods <= set(MODULES)
    for name in methods:
        assert not everywhere(name) & (methods - {name}), name


def test_registry_entries_are_strings_of_modules_that_exist():
    for table, entries in registry.TABLES.items():
        for name, target in entries.items():
            module, _, attribute = target.partition(":")
            tree = ast.parse(MODULES[module].read_text())
            assert attribute in {getattr(node, "name", None) for node in tree.body}, (table, name)


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name):
    direct = {target.split(".")[0] for target in at_once(ast.parse(MODULES[name].read_text()))}
    assert not direct & HEAVY


def test_light_modules_load_nothing_heavy():
    """The same at run time, through whatever they import."""
    code = f"import sys; import {', '.join(LIGHT)}; print(sorted(set(sys.modules) & {HEAVY}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def loaded(code: str, *arguments: str) -> set[str]:
    """What is costly and loaded in a process after this code."""
    says = f"{code}\nprint('loaded', *{COSTLY} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", says, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n")[-2].split()[1:])


@pytest.mark.parametrize("command", MAY_LOAD)
def test_a_command_loads_what_it_needs_and_no_more(command):
    code = """
import sys
from fedpeft.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
"""
    assert loaded(code, *command.split()) == MAY_LOAD[command]


def test_a_run_has_loaded_nothing_of_its_models_baselines_and_report_before_it_begins():
    assert loaded("import sys; import fedpeft.simulations.run") == {"numpy", "torch", "safetensors", "flwr"}


def test_a_run_has_loaded_no_more_than_its_model_needs_when_its_first_round_begins():
    """No scikit-learn and no pandas: what they are for comes after a round. And no look for garbage goes through it."""
    code = """
import gc, sys, tempfile
from fedpeft.simulations.grid import LocalGrid
from fedpeft.simulations.run import simulate
def push_messages(self, messages):
    assert gc.isenabled() and gc.get_freeze_count() > 100_000
    raise EOFError
LocalGrid.push_messages = push_messages
with tempfile.TemporaryDirectory() as folder:
    try:
        simulate("quickstart", {"data.limit": 60, "data.clients": 2, "run.clients_per_round": 2}, folder + "/run")
    except EOFError:
        pass
"""
    needed = {"numpy", "torch", "transformers", "peft", "safetensors", "tokenizers", "flwr", "omegaconf"}
    by_transformers, by_measures = {"scipy", "PIL", "jinja2", "bitsandbytes"}, {"torchmetrics", "matplotlib"}
    assert loaded(code) <= needed | by_transformers | by_measures


def test_a_sites_node_has_loaded_no_more_than_it_speaks_with():
    code = "import sys; import fedpeft.cli.deploy, fedpeft.deploy.site.site, fedpeft.deploy.site.node"
    assert loaded(code) == {"numpy", "flwr"}  # numpy by Flower


def test_a_sites_worker_has_loaded_no_more_than_its_model_needs_when_it_has_trained():
    """All that is costly here is of torch, transformers and peft: DEPLOY.md says what a site's memory is."""
    code = f"""
import sys, tempfile
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "integration")!r}]
from flwr.supercore.task_identity import TaskIdentity
from test_deploy_site import Rig
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
with tempfile.TemporaryDirectory() as folder:
    rig = Rig(Path(folder))
    rig.policy(unit="none")
    rig.begin({{"privacy.unit": "none"}})
    assert not (reply := rig.ask()).has_error(), reply.error
"""
    needed = {"numpy", "torch", "transformers", "peft", "safetensors", "tokenizers", "flwr"}
    by_transformers, by_the_coordinators_half = {"scipy", "PIL", "jinja2", "bitsandbytes"}, {"omegaconf"}
    assert loaded(code) <= needed | by_transformers | by_the_coordinators_half


def test_bare_folders_refuse_to_be_imported():
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {MAPPED}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
    importlib.import_module(f"fedpeft.{{name}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"import fedpeft.{name}" for name in MAPPED]
    assert all("pip install -e ." in line for line in lines)


def test_a_list_of_all_names_imports_no_method():
    code = (
        "import sys; from fedpeft.cli import catalogue; rows = catalogue.entries(short=True); "
        f"print({HEAVY} & {{*sys.modules}}, all(row['summary'] for table in rows.values() for row in table))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split("\n")[0] == "set() True"


@pytest.mark.parametrize("table", [table for table in registry.TABLES if table not in ("checks", "datasets")])
def test_a_summary_is_the_first_line_of_the_class(table):
    for name in registry.names(table):
        assert registry.summary(table, name) == inspect.getdoc(registry.load(table, name)).splitlines()[0]
