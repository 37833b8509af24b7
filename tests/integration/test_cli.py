"""Every command, as a person and as a program (--json) would call it: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fedpeft import __version__
from fedpeft import config as configs
from fedpeft.cli import catalogue
from fedpeft.errors import RunError

SUMMARY = {
    *(
        "strategy",
        "engine",
        "seed",
        "rounds",
        "clients",
        "final",
        "best",
        "accuracy_by_round",
        "bytes_up",
        "bytes_down",
    ),
    *("seconds", "trainable_parameters", "quarantined", "epsilon_max"),
}
RULES = {
    *("fedit", "ffa_lora", "fedsvd", "lora_fair", "flora", "flexlora", "hetlora", "fedex", "rolora", "fedsa", "fed_sb"),
}


# simulate and resume --------------------------------------------------------------------------------------------------


def test_simulate_writes_what_it_promises(runs):
    run = runs["fedit"]
    for name in (
        "resolved.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "split.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/head.safetensors",
        "checkpoints/round-000002/state.json",
    ):
        assert (run / name).stat().st_size > 0, name
    plots = list((run / "plots").glob("*.png"))
    assert len(plots) >= 2 and all(path.read_bytes().startswith(b"\x89PNG") for path in plots)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 2]
    assert all("event" in event for event in events)


def test_the_summary_has_every_key(runs):
    summary = json.loads((runs["fedit"] / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert (summary["strategy"], summary["engine"], summary["seed"], summary["rounds"], summary["clients"]) == (
        "fedit",
        "cohort",
        0,
        2,
        3,
    )
    for name in ("final", "best"):
        assert 0 <= summary[name]["accuracy"] <= 1 and summary[name]["loss"] > 0
    assert len(summary["accuracy_by_round"]) == 2 and summary["accuracy_by_round"][-1] == summary["final"]["accuracy"]
    tensors = load_file(runs["fedit"] / "adapter" / "adapter_model.safetensors")
    assert summary["trainable_parameters"] == sum(value.numel() for value in tensors.values())
    # Two rounds of two clients, every tensor in float32 both ways.
    assert summary["bytes_up"] == summary["bytes_down"] == 2 * 2 * 4 * summary["trainable_parameters"]
    assert summary["quarantined"] == [] and summary["epsilon_max"] is None and summary["seconds"] > 0


def test_simulate_for_people_shows_rounds_table_and_paths(fedpeft, tmp_path, tiny_options):
    done = fedpeft("simulate", "fedit", *tiny_options, "run.faults={client-001: nan}", "--out", tmp_path / "run")
    assert done.code == 0
    assert re.search(r"round 1/\d+, [\d.]+ s.*: 2 clients", done.err)
    for text in (
        "no adaptation (round 0)",
        "federated, final",
        " up, ",
        "quarantined: client-001 in 2 rounds",
        f"{tmp_path}/run/report.html",
    ):
        assert text in done.out, text


def test_json_output_is_the_summary_and_nothing_else(fedpeft, tmp_path, runs, tiny_options):
    done = fedpeft("simulate", "fedit", *tiny_options, "--out", tmp_path / "run", "--json")
    assert done.code == 0
    assert done.json == {**json.loads((tmp_path / "run" / "summary.json").read_text()), "out": str(tmp_path / "run")}


def test_a_config_by_path(fedpeft, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "strategy: ffa_lora\ndata: {limit: 80, clients: 2}\nrun: {rounds: 1, baselines: false}\n"
        "client: {local_steps: 1, local_epochs: null}\n"
    )
    done = fedpeft("simulate", tmp_path / "mine.yaml", "--out", tmp_path / "run", "--json")
    assert done.code == 0 and done.json["strategy"] == "ffa_lora" and done.json["rounds"] == 1


def test_the_resolved_config_repeats_the_run(fedpeft, tmp_path, runs):
    done = fedpeft("simulate", runs["text"] / "resolved.yaml", "--out", tmp_path / "run", "--json")
    assert done.code == 0
    first, again = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (runs["text"], tmp_path / "run")
    )
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_folder_that_is_not_empty_is_refused(fedpeft, runs, tiny_options):
    before = (runs["fedit"] / "resolved.yaml").read_text()
    done = fedpeft("simulate", "fedex", *tiny_options, "--out", runs["fedit"])
    assert done.code == 2 and "is not empty" in done.err and "fedpeft resume" in done.err
    assert (runs["fedit"] / "resolved.yaml").read_text() == before


def test_only_a_run_can_be_gone_on_with(fedpeft, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for place in (tmp_path, tmp_path / "mine"):
        done = fedpeft("simulate", "quickstart", "--out", place)
        assert done.code == 2 and done.err.endswith("Give a new folder.") and "resume" not in done.err


def test_a_run_in_the_place_of_its_adapter_is_told_where_that_is(fedpeft, runs, tmp_path):
    for command in (("aggregate", "--strategy", "fedit"), ("merge", "--method", "opcm")):
        done = fedpeft(*command, runs["fedit"], runs["fedit"], "--out", tmp_path / "out")
        assert done.code == 2 and f"Its adapter is {runs['fedit'] / 'adapter'}." in done.err


def test_a_config_that_is_not_utf8_is_told_how_to_become_it(fedpeft, tmp_path):
    (tmp_path / "c.yaml").write_text("run: {rounds: 2}\r\n", encoding="utf-16")
    done = fedpeft("validate", tmp_path / "c.yaml")
    assert done.code == 2 and "is not UTF-8: byte 0xff at 0. Save it as UTF-8" in done.err


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_resume_of_a_finished_run_says_the_same_again(fedpeft, runs, arguments):
    before = json.loads((runs["fedit"] / "summary.json").read_text())
    done = fedpeft("resume", runs["fedit"], *arguments)
    assert done.code == 0
    if arguments:
        assert {key: done.json[key] for key in ("final", "best", "accuracy_by_round")} == {
            key: before[key] for key in ("final", "best", "accuracy_by_round")
        }
    else:
        assert "federated, final" in done.out


def test_resume_of_no_run(fedpeft, tmp_path):
    done = fedpeft("resume", tmp_path)
    assert done.code == 2 and "no resolved.yaml" in done.err


# Exit codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "quickstrat"], "CONFIG: 'quickstrat' is not known. Did you mean 'quickstart'?"),
        (["simulate", "no/such.yaml"], "no file no/such.yaml"),
        (["simulate", "fedit", "strategy.name=fedsdv"], "strategy.name: 'fedsdv' is not known. Did you mean 'fedsvd'?"),
        (["simulate", "fedit", "run.round=3"], "config key run.round: 'round' is not known. Did you mean 'rounds'?"),
        (["simulate", "fedit", "client.learning_rate=1"], "learning_rate"),
        (["simulate", "fedit", "rum.rounds=3"], "Did you mean 'run'?"),
        (["simulate", "fedit", "run.rounds=many"], "run.rounds: 'many' is not a valid int"),
        (["simulate", "fedit", "run.rounds=0"], "run.rounds: 0 is out of range; allowed: >= 1"),
        (["simulate", "fedit", "strategy.every=2"], "every"),
        (["simulate", "fedit", "rounds"], "an override is key=value"),
        (["simulate", "fedit", "run.deadline_s=5"], "run.deadline_s=5.0 needs run.workers"),
        (["simulate", "fedit", "data.source=no-such-set"], "data.source: 'no-such-set'"),
        (["simulate", "fedit", "model.name=no-such-model"], "model.name"),
        (["simulate", "fedit", "adapter.target_modules=[nothing]"], "adapter.target_modules: no linear layer"),
        (["validate", "fedit", "adapter=lora_sb"], "adapter.name"),
        (["list", "strategy"], "Did you mean 'strategies'?"),
        (["show", "fedsdv"], "Did you mean 'fedsvd'"),
        (["data", "prepare", "debain"], "Did you mean 'debian'?"),
        (["report", "no-such-run"], "no-such-run"),
        (["report", "a-run", "--out", "page.html"], "the report of one run is a-run/report.html"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_exit_code_2_with_the_reason(fedpeft, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = fedpeft(*arguments, *(["--out", tmp_path / "out"] if arguments[0] == "simulate" else []))
    assert done.code == 2, done.err
    assert message in done.err and done.err.removeprefix("loading model and data ").startswith("error:")
    assert "Traceback" not in done.err and done.out == ""


@pytest.mark.parametrize(
    "arguments", [["simulate"], ["simulate", "fedit", "--no-such-option"], ["no-such-command"], ["aggregate", "x"]]
)
def test_bad_usage_is_exit_code_2(fedpeft, arguments):
    assert fedpeft(*arguments).code == 2


def test_a_run_that_fails_is_exit_code_1(fedpeft, tmp_path, tiny_options):
    done = fedpeft(
        "simulate", "fedit", *tiny_options, "run.faults={client-000: nan, client-001: crash}", "--out", tmp_path / "run"
    )
    assert done.code == 1
    assert "error: round 1: 1 good replies of 3" in done.err and "client-000" in done.err and "client-001" in done.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted."),
        (RunError("it is on fire"), 1, "error: it is on fire"),
        (OSError(28, "No space left on device", "x"), 1, "error: x: no space left on device; make room on that disk."),
    ],
)
def test_interrupted_or_failed_has_its_exit_code(fedpeft, tmp_path, monkeypatch, error, code, said):
    from fedpeft.simulations import run

    def broken(*arguments, **options):
        raise error

    monkeypatch.setattr(run, "simulate", broken)
    done = fedpeft("simulate", "fedit", "--out", tmp_path)
    assert (done.code, done.err) == (code, said)


def test_help_and_version(fedpeft):
    assert fedpeft("--version").out.strip() == __version__
    done = fedpeft("--help")
    assert done.code == 0
    for command in ("simulate", "resume", "aggregate", "list", "show", "validate", "report", "export", "data", "bench"):
        assert command in done.out
        assert fedpeft(command, "--help").code == 0


def test_help_imports_nothing_heavy():
    code = """
import sys
from fedpeft.cli import main as cli
try:
    cli.main(["--help"])
except SystemExit as error:
    assert not error.code
heavy = {"torch", "transformers", "peft", "ray", "opacus", "flwr", "datasets", "matplotlib", "sklearn"}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []" and "simulate" in done.stdout


def test_the_installed_command_and_the_module_are_the_same():
    command = [sys.executable, "-m", "fedpeft.cli.main", "validate", "no-such"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "error: CONFIG: 'no-such' is not known" in done.stderr and done.stdout == ""


# validate, list, show -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", configs.shipped_configs())
def test_shipped_configs_are_valid(fedpeft, name):
    done = fedpeft("validate", name, "--json")
    assert done.code == 0 and done.json["valid"] is True
    assert configs.load(done.json["config"]) == configs.load(name)
    assert fedpeft("validate", name).out.rstrip().endswith("valid. Model and data were not opened.")


def test_validate_loads_neither_model_nor_data(fedpeft):
    assert fedpeft("validate", "text", "model.name=/no/such/model", "data.source=/no/such/data").code == 0


def test_list(fedpeft):
    tables = fedpeft("list", "--json").json
    assert set(tables) == set(catalogue.TABLES) and all(tables.values())
    assert {row["name"] for row in tables["strategies"]} >= RULES
    for table in catalogue.TABLES:
        assert fedpeft("list", table, "--json").json == {table: tables[table]}
        for_people = fedpeft("list", table).out
        for row in tables[table]:
            assert row["name"] in for_people
            assert row["summary"] and row["summary"] in for_people


@pytest.mark.parametrize(
    ("table", "name"), [(table, row["name"]) for table, rows in catalogue.entries().items() for row in rows]
)
def test_show(fedpeft, table, name):
    done = fedpeft("show", name, "--json")
    entry = done.json
    assert done.code == 0 and entry["name"] == name
    if table == "strategies":
        assert (
            entry["table"] == table
            and entry["paper"]
            and entry["needs"] in ("sum", "individual")
            and entry["description"]
        )
    for option in entry.get("options", []):
        assert option["help"] and option["allowed"]
    text = fedpeft("show", name).out
    assert name in text
    assert all(option["name"] in text for option in entry.get("options", []))


def test_list_and_show_say_what_was_measured_of_an_adapter(fedpeft):
    row = next(line for line in fedpeft("list", "adapters").out.splitlines() if line.startswith("nola "))
    assert "76% off" in row and "2 basis" in row
    text = fedpeft("show", "nola").out
    assert "wrappers: fedprox" in text and "privacy: sample, client" in text and "secure aggregation: fedit" in text
    (line,) = (line for line in text.splitlines() if line.startswith('train="beta"'))
    assert "exact" in line and line.split()[-3:] == ["pass", "yes", "yes"]


def test_show_gives_options_as_users_write_them(fedpeft):
    options = {row["name"]: row for row in fedpeft("show", "lora_fair", "--json").json["options"]}
    assert options["lambda"]["default"] == configs.load({"strategy": "lora_fair"}).strategy.options.get("lambda")
    assert {"rounds", "seed", "engine"} <= {row["name"] for row in fedpeft("show", "run", "--json").json["options"]}


def test_data_list(fedpeft):
    rows = fedpeft("data", "list", "--json").json["recipes"]
    assert {"debian", "minilm"} <= {row["name"] for row in rows} and all(row["summary"] for row in rows)
    assert "debian" in fedpeft("data", "list").out


# benchmarks -----------------------------------------------------------------------------------------------------------


def test_bench_passes_its_options_on(fedpeft, tmp_path, monkeypatch):
    from fedpeft.simulations.benchmarks import federated, server_cost

    asked = []
    for module in (federated, server_cost):
        monkeypatch.setattr(module, "run", lambda *a, tell, **named: asked.append((a, named)) or {"done": True})
    done = fedpeft("bench", "federated", "--seeds", 3, "--quick", "--out", tmp_path, "--json")
    assert done.code == 0 and done.json == {"done": True}
    done = fedpeft(
        "bench", "server", "--sites", 2, "--m", 24, "--n", 20, "--r", 3, "--clients", 5, "--out", tmp_path, "--json"
    )
    assert done.code == 0 and done.json == {"done": True}
    assert asked == [
        ((tmp_path, 3, True), {}),
        ((tmp_path,), {"sites": 2, "m": 24, "n": 20, "r": 3, "clients": 5, "quick": False}),
    ]
    assert fedpeft("bench", "federated", "--seeds", 1, "--out", tmp_path).code == 2
