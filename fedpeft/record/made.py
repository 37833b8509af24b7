"""How a run was made: its title, the machine and software, and its config, what differs from the defaults first."""

from __future__ import annotations

import html
import json
import shlex
import time
from contextlib import suppress
from typing import Any

from fedpeft import config as configs
from fedpeft.errors import InputError
from fedpeft.record.pages import html_folded, html_table
from fedpeft.record.run_folder import Run

CHOSEN = ("strategy.name", "adapter.name", "client.optimizer")  # shown where they are not the default
NAMES = {"fedsvd": "FedSVD", "fedit": "FedIT", "fedavg": "FedAvg", "fedprox": "FedProx", "fedex": "FedEx-LoRA"}


def title_of(run: Run) -> str:
    """What on what: "FedSVD on digits, 20 clients, tiny-vit", and what it protects."""
    data, model = run.config.get("data") or {}, run.config.get("model") or {}
    strategy = str(run.summary.get("strategy") or (run.config.get("strategy") or {}).get("name") or "A run")
    source = str(data.get("source") or "").rstrip("/").rpartition("/")[2]
    base = str(model.get("name") or "").rstrip("/").rpartition("/")[2]
    private = (run.config.get("privacy") or {}).get("unit", "none") != "none"
    parts = [
        NAMES.get(strategy, strategy) + (f" on {source}" if source else ""),
        *([f"{run.summary['clients']} clients"] if run.summary.get("clients") else []),
        *([base] if base else []),
        *(["private"] if private else []),
        *([f"without {run.summary['unlearning']['asked']['words']}"] if run.summary.get("unlearning") else []),
    ]
    return ", ".join(parts)


def html_made(run: Run) -> list[str]:
    """When, by what software, on what, from which data and model, and how to do it again."""
    data, model, section = (run.config.get(key) or {} for key in ("data", "model", "run"))
    # Of what was unlearned they are those of the run that it was unlearned from.
    times = [event["time"] for event in run.events if isinstance(event.get("time"), int | float)]
    versions = run.identity.get("versions") or {}
    asked = run.summary.get("unlearning")
    rows = [
        ["begun", time.strftime("%d %b %Y %H:%M", time.localtime(times[0])) if times and not asked else ""],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items())],
        ["device", str(run.identity.get("device") or section.get("device") or "")],
        ["model", " ".join(str(model[key]) for key in ("name", "task", "dtype") if model.get(key))],
        ["data", ", test ".join(str(data[key]) for key in ("source", "test") if data.get(key))],
        ["command", _command_of(run)],
    ]
    shown = [[key, value] for key, value in rows if value]
    return ["<h2>How it was made</h2>", html_table([], shown)]


def _command_of(run: Run) -> str:
    file = shlex.quote(str(run.path / "resolved.yaml"))
    asked = run.summary.get("unlearning")
    if asked:
        what = f"--{asked['asked']['kind']} {shlex.quote(str(asked['asked']['name']))}"
        return f"fedpeft unlearn {shlex.quote(asked['run'])} --method {asked['method']} {what}"
    if (run.config.get("run") or {}).get("engine") == "sites":
        return f"fedpeft server run DIR {file}"
    return f"fedpeft simulate {file}"


def html_config(run: Run) -> list[str]:
    """The keys that are not the defaults; all of them folded."""
    usual = _usual_config(run.config)
    changed = [[key, value] for key, value in flatten(run.config).items() if usual.get(key) != value]
    listed = html_table(["key", "value"], changed) if changed else "<p>All keys have their defaults.</p>"
    whole = html_folded("All keys", f'<pre tabindex="0">{html.escape(run.config_text)}</pre>')
    return ["<h2>Config</h2>", "<p>Keys that are not the defaults:</p>", listed, whole]


def _usual_config(config: dict[str, Any]) -> dict[str, str]:
    """Dotted key -> default, those of the options of its strategy, adapter and optimizer among them."""
    chosen = {"strategy": "name", "adapter": "name", "client": "optimizer"}
    named = {section: {key: (config.get(section) or {}).get(key)} for section, key in chosen.items()}
    tree: dict[str, Any] = {}
    for section, value in named.items():
        with suppress(InputError):  # of another version, or another package
            configs.load({**tree, section: value})
            tree[section] = value
    plain = flatten(configs.to_tree(configs.load({})))
    return {**flatten(configs.to_tree(configs.load(tree))), **{key: plain[key] for key in CHOSEN}}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as JSON.

    >>> flatten({"run": {"seed": 1}})
    {'run.seed': '1'}
    """
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: json.dumps(value)}
    return flat
