"""`fedpeft unlearn`: a run's model without a client, a task or some records, and what it still knows of them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft import folders
from fedpeft.adapters import folder
from fedpeft.config import Config, PrivacyConfig, parse_overrides
from fedpeft.data import split
from fedpeft.errors import InputError, RunError, Stopped
from fedpeft.files import explain_error, read_object, write_bytes
from fedpeft.record.metrics import make_finite, read
from fedpeft.run import identity
from fedpeft.state import AdapterState
from fedpeft.unlearning import asked as asking
from fedpeft.unlearning import bounded, measures
from fedpeft.unlearning.asked import TASK, Asked
from fedpeft.unlearning.method import Case, Outcome, UnlearningMethod, make
from fedpeft.unlearning.opening import open_case, read_config

SUMMARY, KEY = "summary.json", "unlearning"
FINGERPRINTS = ("base model", "training records", "test records", "processed inputs")
MUCH = 0.05  # of the accuracy on what is kept, that is said to be lost
NO_YARDSTICK = (
    "distance and agreement are to a model retrained without it, which was not given: --method retrain makes one, and "
    "--against DIR names it"
)


def unlearn(
    run: str | Path,
    method: str = "loku",
    *,
    client: str | None = None,
    task: int | None = None,
    records: str | Path | None = None,
    options: Sequence[str] | dict[str, Any] = (),
    out: str | Path | None = None,
    against: str | Path | None = None,
) -> dict[str, Any]:
    """Make a model of a finished run without what is named, and say what it still knows of it.

    Args:
        run: its folder. It stays as it is.
        method: of the registry's table `unlearning`.
        client, task, records: what is to be forgotten, one of them: a client's name, the number of a task from 0 on,
            a file of training records.
        options: of the method, as `key=value` or a mapping.
        out: folder of the result, new or empty; a run folder for `predict`, `chat` and `export`. Default is
            runs/RUN-METHOD-1, -2, ...
        against: what `method="retrain"` has made of the same request, to measure the distance to.

    Returns:
        `rows` by model ("trained", "unlearned", "retrained"), `cost`, `privacy` (sentences), `notes`, `asked`, `out`.

    Raises:
        InputError: the run, the method or what is asked cannot be used; nothing was trained.
        RunError: the training diverged or failed, or kept too little.
    """
    asking.require_one(client, task, records)
    run = folders.run_folder(run)
    config = read_config(run)
    way = make(method, parse_overrides(list(options)) if not isinstance(options, dict) else options)

    case = open_case(run, config, way, asking.seeker(config, client, task, records))
    # Before anything is trained: another request's yardstick is none.
    yardstick = None if against is None else _open_yardstick(Path(against), case)
    with folders.new(out, Path("runs") / f"{run.name}-{method}") as made, _remove_unfinished(made, way.reruns):
        # A method that does not rerun begins the folder when it is done: what a kill leaves is then no run, which
        # `resume` would train from its first round.
        done = None if way.reruns else _carry_out(way, case, made.path)
        _begin_folder(case, way, made.path)
        if done is not None:
            _write_outcome(case, done[0], made.path)
    with _remove_unfinished(made, way.reruns):
        outcome, seconds = done or _carry_out(way, case, made.path)
    made.point()
    result = _describe_outcome(case, method, way, outcome, seconds, outcome.adapter if way.reruns else yardstick)
    with folders.alone(made.path):
        summary = {**read_object(made.path / SUMMARY), KEY: result}
        write_bytes(made.path / SUMMARY, (json.dumps(make_finite(summary), indent=2) + "\n").encode())
    return {**result, "out": str(made.path)}


@contextmanager
def _remove_unfinished(made: folders.Made, reruns: bool) -> Iterator[None]:
    """Leave no folder behind of what was refused, stopped or failed: of a run, before its first round."""
    begun = ["resolved.yaml", identity.FILE, "split.json", folders.LOCK]
    try:
        yield
    except BaseException as error:
        if not reruns:
            shutil.rmtree(made.path / "adapter", ignore_errors=True)
            made.undo(*begun, "metrics.jsonl", SUMMARY)
        elif not (made.path / "metrics.jsonl").exists():
            made.undo(*begun)
        elif isinstance(error, Stopped):
            error.advice = folders.advice(made.path)
        elif isinstance(error, OSError):
            raise RunError(f"{explain_error(error)} {folders.advice(made.path)}") from error
        raise


def _carry_out(way: UnlearningMethod, case: Case, folder: Path) -> tuple[Outcome, float]:
    begun = time.monotonic()
    outcome = way.unlearn(case, folder)
    if not all(bool(value.isfinite().all()) for value in outcome.adapter.tensors.values()):
        raise RunError(f"{type(way).__name__}: its training diverged, to numbers that are not finite. Lower the rate.")
    return outcome, time.monotonic() - begun


def _begin_folder(case: Case, way: UnlearningMethod, made: Path) -> None:
    """Write what a run folder of the rest begins with; what makes it one, its config, is the last."""
    parts = case.asked.without(
        split.load(case.run / "split.json", case.world.train.fingerprint, _client_names(case.run))
    )
    config = leave_out(case.config, case.asked, _client_names(case.run), list(parts))
    if not way.reruns:
        config = replace(config, privacy=PrivacyConfig())  # what follows reads records without noise
    # Checked as any config, since fewer clients may be too few.
    text = configs.to_yaml(configs.from_yaml(configs.to_yaml(config)))
    identity.begin(made)
    known = {key: identity.fingerprint_of(case.run, key) for key in FINGERPRINTS}
    about = {"reruns": way.reruns, "request": _fingerprint_of(case), "words": case.asked.words, "run": str(case.run)}
    known[identity.UNLEARNING] = about
    identity.hold(made, {key: value for key, value in known.items() if value is not None}, config)
    split.save(made / "split.json", parts, case.world.train, config)
    write_bytes(made / "resolved.yaml", text.encode())


def leave_out(config: Config, asked: Asked, before: Sequence[str], after: Sequence[str]) -> Config:
    """The config of the run without what is asked: of fewer clients, or tasks, and otherwise the same.

    Args:
        before, after: the clients, in their order.
    """
    adapter, run, section = config.adapter, config.run, config.continual
    if adapter.client_ranks is not None:
        ranks = {name: adapter.client_ranks[place % len(adapter.client_ranks)] for place, name in enumerate(before)}
        adapter = replace(adapter, client_ranks=[ranks[name] for name in after])
    asks = None if run.clients_per_round is None else min(run.clients_per_round, len(after))
    faults = {name: fault for name, fault in run.faults.items() if name in after}
    run = replace(run, clients_per_round=asks, faults=faults, baselines=False, trained_baselines=[])
    if asked.kind == TASK:
        each = run.rounds // (section.tasks - len(section.leave_out))
        run = replace(run, rounds=run.rounds - each)
        gone = [task for task in range(section.tasks) if task not in section.leave_out][int(asked.name)]
        section = replace(section, leave_out=sorted([*section.leave_out, gone]))
    data = replace(config.data, clients=len(after), split=None)
    return replace(config, adapter=adapter, run=run, continual=section, data=data)


def _client_names(run: Path) -> list[str]:
    return split.client_names(run / "split.json")


def _write_outcome(case: Case, outcome: Outcome, made: Path) -> None:
    """The adapter as a run leaves it, and of the run's record what its readers need."""
    about = folder.about(case.run / "adapter")
    folder.save(outcome.adapter, made / "adapter", **about)
    kept = {key: value for key, value in read_object(case.run / SUMMARY).items() if key in ("texts", "evaluated_on")}
    case.write(outcome.adapter)
    score = measures.look(case.model, case.world.test_encoded, case.config.run.evaluate_tokens).measured
    rounds = configs.load(made / "resolved.yaml").run.rounds
    record = read(case.run / "metrics.jsonl")
    events = [event for event in record if event["event"] == "start" or event.get("round") == 0]
    del score["num-examples"]
    events.append({"event": "evaluate", "round": rounds, **score})
    write_bytes(made / "metrics.jsonl", "".join(json.dumps(make_finite(event)) + "\n" for event in events).encode())
    summary = {**kept, "clients": len(_client_names(made)), "rounds": rounds, "test_records": len(case.world.test)}
    write_bytes(made / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def _describe_outcome(
    case: Case, name: str, way: UnlearningMethod, outcome: Outcome, seconds: float, yardstick: AdapterState | None
) -> dict[str, Any]:
    known = {"trained": case.adapter, "retrained" if way.reruns else "unlearned": outcome.adapter}
    if yardstick is not None:
        known["retrained"] = yardstick
    seen = {model: measures.know(case, adapter) for model, adapter in known.items()}
    rows = {model: measures.describe(case, one, seen.get("retrained")) for model, one in seen.items()}
    held = len(case.asked.numbers) - len(case.forget)
    notes = list(outcome.notes)
    if held:
        notes.append(
            f"{held} of the {len(case.asked.numbers)} records were never trained on (held out, or no client's)"
        )
    if not way.reruns and seen["unlearned"].forget.measured["loss"] < seen["trained"].forget.measured["loss"]:
        notes.append("by its loss, what was to be forgotten is better known than before; --method retrain forgets it")
    if not way.reruns:
        notes += _say_what_is_lost(seen["trained"].retain, seen["unlearned"].retain)
    if yardstick is None:
        notes.append(NO_YARDSTICK)
    return {
        "run": str(case.run),
        "method": name,
        "options": configs.to_tree(way.config),
        "asked": {
            "kind": case.asked.kind,
            "name": case.asked.name,
            "words": case.asked.words,
            "forget_records": len(case.forget),
            "retain_records": len(case.retain),
            "test_records": len(case.test),
            "fingerprint": _fingerprint_of(case),
        },
        "rows": make_finite(rows),
        "cost": {"seconds": seconds, "steps": outcome.steps, "record_passes": outcome.passes},
        "privacy": bounded.sentences(case.config, read_object(case.run / SUMMARY), case.asked, way.reruns),
        "notes": notes,
    }


def _say_what_is_lost(before: measures.Seen, after: measures.Seen) -> list[str]:
    """A note where much of what is to be kept is gone too."""
    told, tells = (seen.measured.get("accuracy", 0.0) for seen in (before, after))
    if told - tells <= MUCH:
        return []
    return [
        f"it went too far: accuracy on what is kept fell from {told:.1%} to {tells:.1%}; --method retrain keeps it, "
        "and a smaller lr may"
    ]


def _fingerprint_of(case: Case) -> str:
    return case.asked.fingerprint((case.run / "resolved.yaml").read_text())


def _open_yardstick(path: Path, case: Case) -> AdapterState:
    """The adapter of a run that was retrained without the same records.

    Raises:
        InputError: it is another run, or of another request.
    """
    run = folders.run_folder(path)
    about = identity.fingerprint_of(run, identity.UNLEARNING) or {}
    if not about.get("reruns"):
        raise InputError(f"--against {path}: not what `fedpeft unlearn --method retrain` has made.")
    if about["request"] != _fingerprint_of(case):
        raise InputError(
            f"--against {path}: retrained without {about['words']} of {about['run']}; here {case.asked.words} of "
            f"{case.run} is to be forgotten."
        )
    if not (run / SUMMARY).is_file():
        raise InputError(f"--against {path}: it is not finished. `fedpeft resume {path}` goes on with it.")
    return folder.load(run / "adapter")
