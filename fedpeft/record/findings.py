"""Findings follow from a run's scores: how sure a number is, what it is compared with, who stands out.

standard error   sqrt(p (1 - p) / n) of an accuracy p over n test records; none for next tokens, which depend on
                 each other
comparison       the best model of the same records that no federation trained, and the gap to it
constant         "no better than always giving one answer": the accuracy is at most one standard error above the
                 share of the largest class
sequence         the accuracy of the head that answers, over all classes seen; forgetting is that of Chaudhry et al.
                 (arXiv 1801.10112), as `forgetting_chaudhry` of `fedpeft.continual.matrix`
"""

from __future__ import annotations

import math
from typing import Any

from fedpeft.record import measured

Event = dict[str, Any]
LAST = 5  # evaluated rounds whose mean stands beside the last
SERVER = "server test set"
FROZEN, FROZEN_HEAD = "frozen", "frozen_head"
NAMES = {  # what a comparison may be with -> words
    FROZEN: "the frozen model",
    FROZEN_HEAD: "the frozen model with the same head",
    "frozen_logistic": "a logistic regression on frozen features of the pooled data",
    "pixels_or_words_logistic": "a logistic regression on raw inputs of the pooled data",
    "local": "each client alone, the mean of their models",
    "central": "one model trained on all clients' records",
    "largest_class": "always giving one answer",
    "clients_largest_class": "each client always giving one answer",
    "clients_local": "each client alone",
    "clients_central": "one model trained on all clients' records",
}


def of(events: list[Event], config: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Entries of the summary beside `found`, what `metrics.summarise` has computed; some take the place of its own."""
    given = _find_baselines(events)
    entries: dict[str, Any] = {"baselines": given}
    if any(event["event"] == "task" for event in events) or (config.get("continual") or {}).get("body") is not None:
        entries |= _find_sequence(events, config, found, given)
    else:
        entries |= {**_find_tested(events, found), "last_rounds": _last_rounds(found)}
    whole = {**found, **entries}
    tokens = whole["test_tokens"] is not None  # accuracy is then a share of tokens, which are not independent
    entries["standard_error"] = None if tokens else standard_error(whole["final"], whole["test_records"])
    if whole.get("sequence") is None:
        prefix = "" if whole["evaluated_on"] == SERVER else "client_"
        entries["measures"] = measured.table(events, prefix, (whole["final"] or {}).get("round"))
        entries["by_class"] = measured.by_class(events)
        entries["metric"] = next((event.get("metric") for event in events if event["event"] == "start"), None)
    if tokens and whole["final"] is not None:
        entries["perplexity"] = _find_perplexity(events, whole)
    return {**entries, "comparison": _compare_models({**whole, **entries}), "updates": _find_updates(events)}


def standard_error(score: Event | None, records: int | None) -> float | None:
    """Of an accuracy, as a binomial share; None where accuracy or number of records is not known."""
    accuracy = (score or {}).get("accuracy")
    return None if accuracy is None or not records else math.sqrt(accuracy * (1 - accuracy) / records)


def _find_baselines(events: list[Event]) -> dict[str, Any]:
    return {
        key: value
        for event in events
        if event["event"] == "baselines"
        for key, value in event.items()
        if key not in ("event", "time")
    }


def _find_tested(events: list[Event], found: dict[str, Any]) -> dict[str, Any]:
    """Records, and for language models tokens, behind the final score."""
    final = found["final"] or {}
    if found["evaluated_on"] == SERVER:
        last = next(
            (
                event
                for event in reversed(events)
                if event["event"] in ("round", "evaluate") and event.get("round") == final.get("round", 0)
            ),
            {},
        )
        return {"test_records": last.get("test_records"), "test_tokens": last.get("test_tokens")}
    results = _clients_evaluated(events, final.get("round"))
    tokens = [row["test_tokens"] for row in results if "test_tokens" in row]
    return {
        "test_records": int(sum(row["num-examples"] for row in results)) or None,
        "test_tokens": int(sum(tokens)) if tokens else None,
    }


def _clients_evaluated(events: list[Event], number: int | None) -> list[Event]:
    event = next((event for event in events if event["event"] == "clients_evaluated" and event["round"] == number), {})
    return list(event.get("clients", {}).values())


def _find_perplexity(events: list[Event], found: dict[str, Any]) -> float | None:
    """exp of the mean loss of a token, over all tokens of the final evaluation."""
    number = found["final"]["round"]
    if found["evaluated_on"] == SERVER:
        rows = [event for event in events if event["event"] == "round" and event["round"] == number]
    else:
        rows = _clients_evaluated(events, number)
    rows = [row for row in rows if row.get("token_loss") is not None and row.get("test_tokens")]
    tokens = sum(row["test_tokens"] for row in rows)
    loss = sum(row["token_loss"] * row["test_tokens"] for row in rows) / tokens if tokens else math.inf
    # exp is beyond a float from 710 on.
    return math.exp(loss) if loss < 700 else None


def _last_rounds(found: dict[str, Any]) -> dict[str, Any] | None:
    """Mean accuracy of the last evaluated rounds; None where there are not two."""
    scores = zip(found["evaluated_rounds"], found["accuracy_by_round"], strict=True)
    pairs = [(number, value) for number, value in scores if value is not None][-LAST:]
    if len(pairs) < 2:
        return None
    return {"rounds": [number for number, _ in pairs], "accuracy": sum(value for _, value in pairs) / len(pairs)}


# Comparison -----------------------------------------------------------------------------------------------------------


def _compare_models(summary: dict[str, Any]) -> dict[str, Any] | None:
    """The best of what did not federate, on the same records, and the gap; None where nothing can be compared."""
    accuracy = (summary["final"] or {}).get("accuracy")
    rows = find_comparable(summary)
    if accuracy is None or not rows:
        return None
    best = max(rows, key=lambda name: rows[name])
    constant = next((rows[key] for key in ("clients_largest_class", "largest_class") if key in rows), None)
    error = summary["standard_error"] or 0.0
    return {
        "baseline": best,
        "accuracy": rows[best],
        "gap": accuracy - rows[best],
        "constant": constant,
        "no_better_than_constant": None if constant is None else accuracy <= constant + error,
    }


def find_comparable(summary: dict[str, Any]) -> dict[str, float]:
    """Accuracies, by `NAMES`, of models that no federation trained, on the records of the final score."""
    given, sequence = summary["baselines"], summary.get("sequence")
    rows: dict[str, Any] = {}
    if sequence is not None:
        if sequence["tasks_done"] < sequence["tasks"]:
            return {}  # the others know all classes
        # Of all classes too, and so not to be compared where a task is left out for good.
        whole = () if sequence["left_out"] else ("frozen_logistic", "pixels_or_words_logistic", "largest_class")
        rows = {key: given.get(key) for key in (FROZEN_HEAD, *whole)}
    else:
        baseline = summary["baseline"] or {}
        if baseline.get("evaluated_on") == summary["evaluated_on"]:
            rows[FROZEN] = baseline.get("accuracy")
        own: tuple[str, ...] = ("frozen_logistic", "pixels_or_words_logistic", "local", "central", "largest_class")
        if summary["evaluated_on"] != SERVER:
            own = ("clients_largest_class", "clients_local", "clients_central")
        for key in own:
            rows[key] = given.get(key)
    return {key: value for key, value in rows.items() if isinstance(value, int | float)}


# A sequence of tasks --------------------------------------------------------------------------------------------------


def _find_sequence(
    events: list[Event], config: dict[str, Any], found: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """`final` is the head that answers, over the classes of all tasks so far; there is no best over unlike classes.

    The classifier that was trained stands in `sequence.trained_classifier`: for many heads it is not what answers.
    """
    tasks = [event for event in events if event["event"] == "task"]
    section = config.get("continual") or {}
    done, left_out = len(tasks), len(set(section.get("leave_out") or ()))
    planned = int(section.get("tasks") or done + left_out) - left_out
    curve = [
        sum(event["right"][: number + 1]) / max(1, sum(event["count"][: number + 1]))
        for number, event in enumerate(tasks)
    ]
    final, records, head = None, None, section.get("head")
    if tasks:
        records = sum(tasks[-1]["count"][:done])
        final = {"round": tasks[-1]["round"], "accuracy": curve[-1], "loss": None}
    frozen = given.get(FROZEN_HEAD)
    baseline = None
    if frozen is not None:
        baseline = {"round": 0, "accuracy": frozen, "loss": None, "evaluated_on": SERVER}
    sequence = {
        "head": head,
        "tasks": planned,
        "tasks_done": done,
        "left_out": left_out,
        "classes": sum(len(event["classes"]) for event in tasks),
        "accuracy_by_task": curve,
        "rounds_of_tasks": [event["round"] for event in tasks],
        "forgetting": _mean_forgetting(tasks),
        "frozen_head_accuracy": frozen,
        "frozen_head_by_task": given.get(f"{FROZEN_HEAD}_by_task"),
        "frozen_head_forgetting": given.get(f"{FROZEN_HEAD}_forgetting"),
        "trained_classifier": _find_trained(events, found),
    }
    return {
        "final": final,
        "best": None,
        "baseline": baseline,
        "evaluated_on": SERVER,
        "last_rounds": None,
        "test_records": records,
        "test_tokens": None,
        "sequence": sequence,
        "evaluated_rounds": None,
        "accuracy_by_round": None,
    }


def _find_trained(events: list[Event], found: dict[str, Any]) -> dict[str, Any] | None:
    """The classifier as trained: its last score, and those of all rounds with the number of classes behind each."""
    if found["final"] is None:
        return None
    classes = {event["round"]: event.get("classes") for event in events if event["event"] == "round"}
    return {
        **found["final"],
        "rounds": found["evaluated_rounds"],
        "accuracy_by_round": found["accuracy_by_round"],
        "classes_by_round": [classes.get(number) for number in found["evaluated_rounds"]],
    }


def _mean_forgetting(tasks: list[Event]) -> float | None:
    rows = [
        [right / count if count else math.nan for right, count in zip(event["right"], event["count"], strict=True)]
        for event in tasks
    ]
    if len(rows) < 2:
        return None
    # The best of before, without the end itself: a task that is best there has a forgetting below 0.
    lost = [max(row[task] for row in rows[task:-1]) - rows[-1][task] for task in range(len(rows) - 1)]
    value = sum(lost) / len(lost)
    return value if math.isfinite(value) else None


# Updates --------------------------------------------------------------------------------------------------------------


def _find_updates(events: list[Event]) -> list[dict[str, Any]]:
    """A row for each client whose update was far beyond the others', or that a robust rule cut, clipped or left out.

    `times_median` is the most, in units of the median norm of the others' updates: null where they did not move, or
    where the client was never far.
    """
    rows: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] != "round":
            continue
        for client, times in event.get("far_updates", {}).items():
            row = rows.setdefault(client, _row_of(client))
            row["far_rounds"].append(event["round"])
            row["times_median"] = max(row["times_median"] or 0.0, times) if times is not None else row["times_median"]
        for client, what in event.get("treated", {}).items():
            row = rows.setdefault(client, _row_of(client))
            row["treated_rounds"].append(event["round"])
            row["treated"] = what
    return sorted(rows.values(), key=lambda row: (-len(row["far_rounds"]), -len(row["treated_rounds"]), row["client"]))


def _row_of(client: str) -> dict[str, Any]:
    return {"client": client, "far_rounds": [], "times_median": None, "treated_rounds": [], "treated": None}
