"""What `fedpeft unlearn` has made, for readers: what is forgotten, what is kept, and how that was measured."""

from __future__ import annotations

import html
from typing import Any

from fedpeft.record.pages import html_list, html_note, html_table
from fedpeft.record.words import percent

MEASURES = {
    "membership attack, AUC": "attack_auc",
    "membership attack, advantage": "attack_advantage",
    "accuracy on what is forgotten": "forget_accuracy",
    "loss on what is forgotten": "forget_loss",
    "accuracy on what is kept": "retain_accuracy",
    "loss on what is kept": "retain_loss",
    "accuracy on the test set": "test_accuracy",
    "loss on the test set": "test_loss",
    "distance to the retrained adapter": "distance",
    "same answers as the retrained": "agreement",
}
MODELS = {"trained": "as trained", "unlearned": "unlearned", "retrained": "retrained"}
ATTACK = "Attack: forgotten training records told from test records by their loss; 0.5 is not at all."


def sentences(result: dict[str, Any]) -> list[str]:
    """What a reader takes away: what was to be forgotten, how far it is, and what that cost of the rest."""
    # Retraining is its own yardstick, and has no row beside it.
    before, after = result["rows"]["trained"], result["rows"].get("unlearned") or result["rows"]["retrained"]
    lines = [f"Unlearned: {result['asked']['words']}, by {result['method']}, from the run {result['run']}."]
    compared = [
        f"{words} {show(key, after[key])} (was {show(key, before[key])})"
        for words, key in MEASURES.items()
        if key in ("forget_accuracy", "retain_accuracy", "test_accuracy", "attack_auc") and after.get(key) is not None
    ]
    text = "; ".join(compared)
    return [*lines, *([f"{text[0].upper()}{text[1:]}."] if text else [])]


def show(key: str, value: float | None) -> str:
    """A measure's value."""
    if value is None:
        return "–"
    return percent(value) if key.endswith("accuracy") or key == "agreement" else f"{value:.3f}"


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: a column for each model, a row for each measure."""
    rows = [[words, *(show(key, row.get(key)) for row in result["rows"].values())] for words, key in MEASURES.items()]
    return ["", *(MODELS[name] for name in result["rows"])], rows


def cost_of(result: dict[str, Any]) -> str:
    """How many records of each kind, and what the work cost."""
    asked, cost = result["asked"], result["cost"]
    return (
        f"{asked['forget_records']} records to forget, {asked['retain_records']} to keep, {asked['test_records']} of "
        f"test; {cost['seconds']:.1f} s, {cost['steps']:,} steps, gradients of {cost['record_passes']:,} records."
    )


def html_unlearned(result: dict[str, Any]) -> list[str]:
    """The section of a report."""
    notes = [f"{line[0].upper()}{line[1:]}." for line in result["notes"]]
    return [
        "<h2>What it still knows</h2>",
        html_table(*table(result)),
        f"<p>{html.escape(ATTACK)} {html.escape(cost_of(result))}</p>",
        *map(html_note, result["privacy"]),
        *([html_list(notes)] if notes else []),
    ]
