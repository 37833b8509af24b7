"""Signs of life: where no terminal is, whatever works in silence says where it stands, on standard error."""

from __future__ import annotations

import json
import time

import pytest
import typer.main

from fedpeft import progress
from fedpeft.cli import alive, console, main
from fedpeft.errors import InputError

FOLDER, CONFIG = "{tmp}/new", "quickstart"
# Every command that can work for more than 30 s: its arguments, and what works.
LONG = {
    "simulate": ([CONFIG], "fedpeft.simulations.run.simulate"),
    "resume": (["{tmp}"], "fedpeft.simulations.run.resume"),
    "aggregate": (["a", "b", "--strategy", "fedit", "--out", FOLDER], "fedpeft.run.offline.aggregate_folders"),
    "merge": (["a", "b", "--method", "opcm", "--out", FOLDER], "fedpeft.run.offline.merge_folders"),
    "report": (["{tmp}"], "fedpeft.record.report.write"),
    "export": (["{tmp}", "--to", FOLDER], "fedpeft.run.export.export"),
    "push": (["{tmp}", "ada/letters"], "fedpeft.run.push.push"),
    "predict": (["{tmp}", "--data", "x.csv", "--out", "{tmp}/o.csv"], "fedpeft.run.predict.predict"),
    "chat": (["{tmp}"], "fedpeft.run.trained.open_trained"),
    "unlearn": (["{tmp}", "--client", "a", "--out", FOLDER], "fedpeft.unlearning.unlearn.unlearn"),
    "audit": ([CONFIG], "fedpeft.run.audit.audit.run"),
    "data prepare": (["vader"], "fedpeft.data.prepare.prepare"),
    "privacy epsilon": (
        ["--sample-rate", "0.1", "--noise-multiplier", "1", "--steps", "10", "--delta", "1e-5"],
        "fedpeft.privacy.accounting.epsilon",
    ),
    "privacy noise": (
        ["--sample-rate", "0.1", "--epsilon", "1", "--steps", "10", "--delta", "1e-5"],
        "fedpeft.privacy.accounting.noise_multiplier",
    ),
    "privacy ledger": (["{tmp}"], "fedpeft.privacy.ledger.read_account"),
    "bench federated": (["--out", FOLDER], "fedpeft.simulations.benchmarks.federated.run"),
    "bench private": (["--out", FOLDER], "fedpeft.simulations.benchmarks.private.run"),
    "bench server": (["--out", FOLDER], "fedpeft.simulations.benchmarks.server_cost.run"),
    "bench data": (["--out", FOLDER], "fedpeft.simulations.benchmarks.data.run"),
    "bench sites": (["--out", FOLDER], "fedpeft.simulations.benchmarks.sites.run"),
    "bench speed": (["--out", FOLDER], "fedpeft.simulations.benchmarks.speed.run"),
    "bench memory": (["--out", FOLDER], "fedpeft.simulations.benchmarks.memory.run"),
    "bench scale": (["--out", FOLDER], "fedpeft.simulations.benchmarks.scale.run"),
    "bench tta": (["--out", FOLDER], "fedpeft.simulations.benchmarks.tta.run"),
    "bench unlearn": (["--out", FOLDER], "fedpeft.simulations.benchmarks.unlearn.run"),
    "bench adapters": (["--out", FOLDER], "fedpeft.simulations.benchmarks.adapters.run"),
    "bench dtype": (["--out", FOLDER], "fedpeft.simulations.benchmarks.dtype.run"),
    "bench continual": (["--out", FOLDER], "fedpeft.simulations.benchmarks.continual.run"),
    "server sites": (["{tmp}", "--wait", "2"], "fedpeft.deploy.coordinator.server.await_sites"),
    "server run": (["{tmp}", CONFIG], "fedpeft.deploy.coordinator.server.run"),
    "server status": (["{tmp}", "last", "--follow"], "fedpeft.deploy.coordinator.server.wait"),
    "server stop": (["{tmp}", "last"], "fedpeft.deploy.coordinator.server.stop"),
    "server fetch": (["{tmp}", "last", "--to", FOLDER], "fedpeft.deploy.coordinator.server.fetch"),
    "site check": (["{tmp}"], "fedpeft.deploy.site.site.check"),
}
# They read or write a small file, and are watched like all others.
SHORT = {
    *("list", "show", "validate", "data list", "site init", "site policy", "site status"),
    *("server init", "server renew", "server add-site", "server logs"),
}


def commands() -> set[str]:
    """Every command of the command line."""
    found = set()
    for name, command in typer.main.get_command(main.app).commands.items():
        inner = getattr(command, "commands", None)
        found |= {f"{name} {part}" for part in inner} if inner else {name}
    return found


def test_every_command_is_one_that_is_tried_here_or_cannot_be_long():
    assert commands() == set(LONG) | SHORT | set(alive.RESIDENT)


@pytest.mark.parametrize("name", LONG)
def test_a_command_that_works_in_silence_says_so(name, tmp_path, monkeypatch, capsys):
    arguments, works = LONG[name]
    monkeypatch.setattr(alive, "EVERY_S", 0.02)

    def work(*_, **__):
        progress.step("clients", 0, 40)
        progress.step("clients", 12, 40)
        time.sleep(0.3)
        raise InputError("enough")

    monkeypatch.setattr(works, work)
    words = [word.format(tmp=tmp_path) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        main.main([*name.split(), *words, "--json"])
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith(f"{name}: 12 of 40 clients")]
    assert ended.value.code == 2 and said.out == "" and len(lines) >= 2, said.err


def test_in_json_mode_standard_output_is_one_object(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alive, "EVERY_S", 0.01)
    monkeypatch.setattr("fedpeft.run.export.export", lambda *_: time.sleep(0.1) or {"adapter": "x"})
    main.app(["export", str(tmp_path), "--to", "x", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == {"adapter": "x"}


# What a line says -----------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told():
    clock = Clock()
    return alive.SignOfLife("simulate", clock), clock


def test_a_line_has_round_clients_rate_and_end(told):
    sign, clock = told
    sign.step("rounds", 0, 20)
    clock.now = 300.0
    sign.step("rounds", 3, 20)
    sign.step("clients", 0, 40)
    assert sign.line() == "simulate: round 4 of 20, 0 of 40 clients, 0.6 rounds/min; 5 min so far, about 28 min left"
    clock.now = 350.0
    sign.step("clients", 20, 40)
    # 3.5 of 20 rounds took 350 s: 16.5 are left.
    assert sign.line().startswith(
        "simulate: round 4 of 20, 20 of 40 clients, 0.4 clients/s; 6 min so far, about 28 min"
    )
    assert sign.left(clock.now) == pytest.approx(1650.0)


def test_what_a_resumed_run_had_done_before_counts_as_nothing(told):
    sign, clock = told
    sign.step("rounds", 10, 20)
    assert sign.left(clock.now) is None
    clock.now = 60.0
    sign.step("rounds", 11, 20)
    assert sign.left(clock.now) == pytest.approx(9 * 60.0)


def test_a_level_that_begins_anew_forgets_those_inside_it(told):
    sign, _ = told
    sign.step("parts", 0, 2)
    sign.step("rounds", 0, 5)
    sign.step("clients", 3, 4)
    sign.step("rounds", 0, 5)
    assert "clients" not in sign.line() and sign.levels["parts"].total == 2
    sign.step("clients", 2, 4)
    sign.step("clients", 1, 4)  # of replies that come after clients have trained together
    assert sign.levels["clients"].done == 2


def test_a_share_is_told_as_part_of_the_whole():
    heard = []
    with progress.heard_by(lambda *step: heard.append(step)), progress.share_of("clients", 256, 1000):
        progress.step("clients", 10, 256)
        progress.step("rounds", 1, 3)
    progress.step("rounds", 2, 3)  # nobody listens
    assert heard == [("clients", 266, 1000), ("rounds", 1, 3)]


def test_a_share_inside_a_share_ends_without_an_error():
    with progress.share_of("clients", 0, 1000), progress.share_of("clients", 256, 1000):
        pass
    assert not progress._shares


def test_a_note_is_a_sign_of_life_too(told, monkeypatch):
    sign, clock = told
    monkeypatch.setattr(alive, "_current", [sign])
    clock.now = 29.0
    assert sign.until_due(30.0) == 1.0
    console.note("a line")
    clock.now = 58.0
    assert sign.until_due(30.0) == 1.0
    clock.now = 60.0
    assert sign.until_due(30.0) == 0.0


def test_a_service_is_not_watched():
    with alive.watched("merge", pytest.fail, 60.0):
        assert [sign.name for sign in alive._current] == ["merge"]
    with alive.watched("server start", pytest.fail, 0.0):
        assert alive._current == []


def test_a_run_tells_rounds_and_clients(tiny):
    heard = []
    with progress.heard_by(lambda *step: heard.append(step)):
        tiny("run", {"run.rounds": 2})
    assert [step for step in heard if step[0] == "rounds"] == [("rounds", done, 2) for done in range(3)]
    assert ("clients", 4, 4) in heard and heard.count(("clients", 0, 4)) == 2  # a simulation asks nobody for a name
