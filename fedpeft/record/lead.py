"""The sentences that a reader takes away from a run: first in its report, in the terminal and in summary.json."""

from __future__ import annotations

from typing import Any

from fedpeft.record import unlearned
from fedpeft.record.findings import FROZEN, NAMES, SERVER
from fedpeft.record.measured import show_measure
from fedpeft.record.words import number, percent, show_points

MOST_NAMES = 5  # in a sentence
SEEDED = "seeded: not private"
FAR_RULE = "over 10 times the median norm of the other clients' updates in a round"


def write_headline(summary: dict[str, Any], config: dict[str, Any]) -> str:
    """All sentences in one line: what a guarantee costs, then what was asked for, then what it is compared with."""
    return " ".join(sentences(summary, config))


def sentences(summary: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What a report says first, one sentence a line: guarantee, test-time adaptation, score, what it compares to."""
    lines = [*_say_privacy(summary, config), *_test_time(summary.get("tta"))]
    if summary.get("sequence"):
        return lines + _say_sequence(summary)
    if summary.get("unlearning"):
        lines += unlearned.sentences(summary["unlearning"])
    elif summary["final"] is None:
        return [*lines, "Nothing has been evaluated yet."]
    if summary["final"] is None:
        return lines
    ends = [*_say_selected(summary), *_say_traffic(summary)]
    return [*lines, *_say_metric(summary), *_say_score(summary, config), *_say_compared(summary), *ends]


def list_warnings(summary: dict[str, Any]) -> list[str]:
    """One for all clients whose updates were refused, and one for each whose update was far beyond the others'."""
    far = [_say_far(row) for row in summary.get("updates", []) if row["far_rounds"]]
    return [*_say_quarantined(summary), *far]


def _say_quarantined(summary: dict[str, Any]) -> list[str]:
    """How many of the clients, how often, and their names where they are few."""
    refused: dict[str, set[int]] = {}
    for entry in summary.get("quarantined", []):
        refused.setdefault(entry["client"], set()).add(entry["round"])
    if not refused:
        return []
    rounds = set().union(*refused.values())
    always = len(rounds) == summary["rounds"] and all(found == rounds for found in refused.values())
    often = "in every round" if always and len(rounds) > 1 else f"in {list_rounds(sorted(rounds))}"
    names = f": {', '.join(sorted(refused))}" if len(refused) <= MOST_NAMES else ""
    return [f"{len(refused)} of {summary['clients']} clients quarantined {often}{names}."]


def list_rounds(rounds: list[int]) -> str:
    """
    >>> list_rounds([4]), list_rounds([1, 2, 3, 7])
    ('round 4', 'rounds 1 to 3, 7')
    """
    spans: list[list[int]] = []
    for number_of in rounds:
        if spans and number_of == spans[-1][1] + 1:
            spans[-1][1] = number_of
        else:
            spans.append([number_of, number_of])
    said = [str(low) if low == high else f"{low} to {high}" for low, high in spans[:MOST_NAMES]]
    return f"round{'s' * (len(rounds) > 1)} {', '.join(said)}{', ...' * (len(spans) > MOST_NAMES)}"


def _say_far(row: dict[str, Any]) -> str:
    rounds, times = row["far_rounds"], row["times_median"]
    often = f"in {len(rounds)} rounds, last {rounds[-1]}" if len(rounds) > 1 else f"in round {rounds[0]}"
    most = "the others did not move" if times is None else f"up to {number(times)} times their median"
    became = f"{row['treated']} by the robust rule" if row["treated"] else "counted like any other"
    return f"{row['client']}: update far beyond the others' {often} ({most}), {became}. Named is one {FAR_RULE}."


def _say_privacy(summary: dict[str, Any], config: dict[str, Any]) -> list[str]:
    section = config.get("privacy") or {}
    if section.get("unit", "none") == "none":
        return []
    spent = summary["epsilon_max"]
    epsilon = "Epsilon is in the clients' ledgers," if spent is None else f"Epsilon {number(spent)}"
    delta = section.get("delta")
    at = f" at delta {delta:g}" if isinstance(delta, int | float) else ""
    one = "record" if section["unit"] == "sample" else "client"
    seeded = f" ({SEEDED})" if section.get("randomness") == "seeded" else ""
    return [f"{epsilon}{at} for one {one}{seeded}."]


def _test_time(tta: dict[str, Any] | None) -> list[str]:
    if not tta:
        return []
    gain, clients = gains(tta), len(tta["clients"])
    return [
        f"On the clients' streams: as trained {percent(tta['source_accuracy'])}, with {tta['method']} "
        f"{percent(tta['tta_accuracy'])}: {show_points(gain['gain'])}; {gain['better']} of {clients} clients better, "
        f"{gain['same']} the same, {gain['worse']} worse ({number(gain['rows'])} rows)."
    ]


def gains(tta: dict[str, Any]) -> dict[str, Any]:
    """What the test-time method changed: the mean over all rows, and how many clients it helped and hurt.

    Two clients are the same where less than half a record lies between them.
    """
    rows = list(tta["clients"].values())
    each = [row["tta_accuracy"] - row["source_accuracy"] for row in rows]
    least = [0.5 / max(1, row.get("rows", row["records"])) for row in rows]
    better = sum(gain > half for gain, half in zip(each, least, strict=True))
    worse = sum(gain < -half for gain, half in zip(each, least, strict=True))
    return {
        "gain": tta["tta_accuracy"] - tta["source_accuracy"],
        "better": better,
        "worse": worse,
        "same": len(rows) - better - worse,
        "rows": sum(row.get("rows", row["records"]) for row in rows),
    }


def _say_sequence(summary: dict[str, Any]) -> list[str]:
    sequence, final = summary["sequence"], summary["final"]
    trained = sequence["trained_classifier"] or {}
    alone = ""
    if trained.get("accuracy") not in (None, (final or {}).get("accuracy")):  # the same where it is what answers
        alone = (
            f"The classifier that was trained has {percent(trained['accuracy'])} on the classes seen by round "
            f"{trained['round']}."
        )
    if final is None:
        return ["No task has ended yet.", *([alone] if alone else [])]
    done, tasks = sequence["tasks_done"], sequence["tasks"]
    classes = f"{'all ' if done == tasks and not sequence['left_out'] else 'the '}{sequence['classes']} classes"
    forgetting = sequence["forgetting"]
    text = (
        f"Accuracy {_say_accuracy(summary)} on {classes} after task {done} of {tasks}, by the head "
        f"{sequence['head'] or 'of the config'}"
    )
    lines = [f"{text}, forgetting {show_points(forgetting).lstrip('+')}." if forgetting is not None else f"{text}."]
    frozen = sequence["frozen_head_accuracy"]
    if frozen is not None and done == tasks:
        lost = sequence["frozen_head_forgetting"]
        beside = f", forgetting {show_points(lost).lstrip('+')}" if lost is not None else ""
        lines.append(
            f"The frozen model with the same head has {percent(frozen)}{beside}: "
            f"{show_points(final['accuracy'] - frozen)}."
        )
    return [*lines, *_say_compared(summary), *([alone] if alone else [])]


def _say_selected(summary: dict[str, Any]) -> list[str]:
    """The round that `run.best` has kept, and whether `run.patience` has ended the run."""
    chosen = summary.get("selected")
    if not chosen or chosen["round"] is None:
        return []
    best = f"best {chosen['metric']} on the clients' held-out records, {number(chosen['value'])}"
    if not chosen["stopped"]:
        return [f"Round {chosen['round']} has the {best}, and is kept in best/."]
    return [
        f"The run stopped after round {summary['rounds']} of {chosen['rounds']}: {chosen['patience']} evaluations were "
        f"no better than round {chosen['round']}, which has the {best}, and is kept in best/."
    ]


def _say_traffic(summary: dict[str, Any]) -> list[str]:
    """That `run.max_traffic_mb` has ended the run."""
    limit = summary.get("traffic")
    if not limit or not limit["stopped"] or (summary.get("selected") or {}).get("stopped"):
        return []
    return [
        f"The run stopped after round {summary['rounds']} of {limit['rounds']}: {number(limit['moved_mb'])} MB were "
        f"moved, and another round would pass run.max_traffic_mb={limit['limit_mb']:g}."
    ]


def _say_metric(summary: dict[str, Any]) -> list[str]:
    """The measure that `run.metric` names, where it is another than what every headline says."""
    name = summary.get("metric")
    row = summary.get("measures", {}).get(name)
    if row is None or name in ("accuracy", "perplexity"):
        return []
    words = row["words"][0].upper() + row["words"][1:]
    if row["final"] is None and not row["clients"]:
        return [f"{words}: not defined after the last round."]
    if row["final"] is None:
        return [f"{words}: {show_measure(row, row['clients']['mean'])}, mean of {row['clients']['clients']} clients."]
    frozen = f"; the frozen model has {show_measure(row, row['frozen'])}" if row["frozen"] is not None else ""
    return [
        f"{words}: {show_measure(row, row['final'])} on the {summary['evaluated_on']} after round "
        f"{summary['final']['round']}{frozen}."
    ]


def _say_score(summary: dict[str, Any], config: dict[str, Any]) -> list[str]:
    final, where = summary["final"], f"on the {summary['evaluated_on']} after round {summary['final']['round']}"
    if summary.get("perplexity") is not None:
        tokens = f"over {number(summary['test_tokens'])} tokens of {number(summary['test_records'])} texts "
        kind = "next" if summary.get("texts") else "hidden"
        right = f"; {kind}-token accuracy {percent(final['accuracy'])}" if final["accuracy"] is not None else ""
        text = f"Perplexity {number(summary['perplexity'])} {tokens}{where}, loss {number(final['loss'])}{right}"
    elif final["accuracy"] is None:
        return [f"Loss {number(final['loss'])} {where}."]
    else:
        text = f"Accuracy {_say_accuracy(summary)} {where}"
    last = summary.get("last_rounds")
    mean = f"; mean of the last {len(last['rounds'])} evaluated rounds {percent(last['accuracy'])}" if last else ""
    return [f"{text}{mean}."]


def _say_accuracy(summary: dict[str, Any]) -> str:
    error, records = summary.get("standard_error"), summary.get("test_records")
    sure = f" ± {100 * error:.1f}" if error is not None else ""
    count = f" (n = {number(records)}{', ± one standard error' if sure else ''})" if records else ""
    return f"{percent(summary['final']['accuracy'])}{sure}{count}"


def _say_compared(summary: dict[str, Any]) -> list[str]:
    found, lines = summary.get("comparison"), []
    if found:
        if found["no_better_than_constant"]:
            lines.append(
                f"That is no better than always saying {_name_constant(summary)} ({percent(found['constant'])})."
            )
        lines.append(
            f"Best without federation: {named(found['baseline'], summary)}, {percent(found['accuracy'])}: "
            f"{show_points(found['gap'])}."
        )
    baseline = summary["baseline"] or {}
    if baseline.get("accuracy") is not None and not summary.get("sequence") and (found or {}).get("baseline") != FROZEN:
        elsewhere = "" if baseline["evaluated_on"] == summary["evaluated_on"] else f" on the {baseline['evaluated_on']}"
        lines.append(f"The frozen model has {percent(baseline['accuracy'])}{elsewhere}.")
    return lines


def named(key: str, summary: dict[str, Any]) -> str:
    """A baseline in words; of the largest class, with its name."""
    return f"always saying {_name_constant(summary)}" if key == "largest_class" else NAMES[key]


def _name_constant(summary: dict[str, Any]) -> str:
    if "clients_largest_class" in summary["baselines"] and summary["evaluated_on"] != SERVER:
        return "the most frequent answer of each client"
    name = summary["baselines"].get("largest_class_name")
    return f"'{name}'" if name is not None else "the largest class"
