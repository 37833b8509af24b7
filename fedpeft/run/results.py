"""A run leaves how good its model is, and its adapter folders, summary, plots and report."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.adapters import averages, folder
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.clients import test_time
from fedpeft.clients.train import evaluate
from fedpeft.data import split
from fedpeft.data.templates import describe_texts
from fedpeft.errors import RunError
from fedpeft.files import write_bytes
from fedpeft.objectives.measures import Tally
from fedpeft.record import report
from fedpeft.record.metrics import read, summarise
from fedpeft.run import generations, guarantee, sequence
from fedpeft.run.best import Best
from fedpeft.run.traffic import Traffic
from fedpeft.run.world import World
from fedpeft.state import DROPPED, ServerState
from fedpeft.strategies.secagg import terms

log = logging.getLogger("fedpeft")


def score(world: World, server: ServerState) -> dict[str, Any]:
    """What is measured of the global model on the server's test set, after what may be the last round also `by_class`.

    In a sequence of tasks it is accuracy and loss on the records of the classes so far. Nothing without a test set.
    """
    if not len(world.test):
        return {}
    if world.config.continual.body is not None:
        return sequence.score(world, server)
    world.local.model.write(server.adapter)
    tally = Tally(world.local.model.base.objective)
    result = evaluate(world.local.model, world.test_encoded, tokens=world.config.run.evaluate_tokens, tally=tally)
    # A run that may end early does not know which round is its last.
    section = world.config.run
    last = server.round == section.rounds or section.patience is not None or section.max_traffic_mb is not None
    classes = tally.by_class(world.test.label_names) if last else {}
    return {
        **{key: value for key, value in result.items() if key != "num-examples"},
        "test_records": int(result["num-examples"]),
        **({"by_class": classes} if classes else {}),
    }


def _describe_texts(world: World) -> dict[str, str] | None:
    """What a language model's records are, and what its loss weighs; None for other models."""
    base = world.local.model.base
    if base.objective.says != "answers":
        return None
    records = world.train if len(world.train) else world.test
    return {
        **describe_texts(records, base.processor, base.objective.encoder_decoder),
        "loss_weighting": world.config.client.loss_weighting,
    }


def _find_average_error(world: World) -> float | None:
    """How far the rule's average of adapters is off the average of what they do; None where it averages no adapter."""
    takes = registry.load("strategies", world.config.strategy.name).takes_any_adapter
    return averages.find_error(world.config.adapter) if takes else None


def finish(
    world: World, server: ServerState, run: Path, best: Best | None = None, traffic: Traffic | None = None
) -> dict[str, Any]:
    """Write the adapter folders, summary, plots and report.

    Raises:
        RunError: every round was dropped, so there is nothing to write.
    """
    if 0 < server.round == server.numbers.get(DROPPED, 0):
        last = [event["reason"] for event in read(run / "metrics.jsonl") if event["event"] == "round_dropped"][-1:]
        raise RunError(f"none of the {server.round} rounds had a result. {' '.join(last)}")
    config, base = world.config, world.local.model.base
    pooled = "classifier" in base.heads and not hasattr(base.backbone, "classifier")
    options: dict[str, Any] = {"base": base.source, "task": config.model.task, "pooled_head": pooled}
    options["settings"] = world.local.model.folder
    # In the form that a next round would send, as clients and users of the folder see the same factors.
    folder.save(flatten_adapter(world.strategy.before_round(server).adapter), run / "adapter", **options)
    if world.strategy.keeps:
        for client in world.local.train_data:
            sent, told = world.strategy.broadcast(server, client), world.strategy.instructions(server)
            adapter, _ = world.local.compose(client, sent, told, before=told.round)
            folder.save(flatten_adapter(adapter), run / "adapter" / "clients" / client, **options)
    events = read(run / "metrics.jsonl")
    extra = {
        "skipped": [entry.tree() for entry in world.skipped],
        "owner": split.owners_of(run / "split.json"),
        "privacy": guarantee.section(world),
        "continual": sequence.summarise(world, server),
        "tta": test_time.describe(config, events),
        "secure_aggregation": terms.describe(config) if config.secagg.enabled else None,
        "wrap": [name for name, _ in config.strategy.wrappers],
        "average_error": _find_average_error(world),
        "texts": _describe_texts(world),
        "selected": None if best is None else best.describe(server.round),
        "traffic": None if traffic is None else traffic.describe(server.round),
        "answers": generations.compare(world, server),
    }
    summary = summarise(events, configs.to_tree(config), extra)
    # Before the report, which is made from it.
    write_bytes(run / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    try:
        report.write(run)
    except OSError:  # `resume` of the finished run writes it, once there is room
        raise
    except Exception as error:  # the run is complete and on the disk: a page about it must not end it
        log.warning(
            "the report could not be written: %s: %s. `fedpeft report %s` writes it again.",
            type(error).__name__,
            error,
            run,
        )
    return {**summary, "out": str(run)}
