"""Play a stream to a method and score it; labels and domain names stay on this side.

>>> import torch
>>> from fedpeft.data.drift import build
>>> stream = build("iid", corruptions=("blur",), limit=64)
>>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
>>> result = run_stream("source", stream, deploy(net, head="1", forward=lambda batch: net(batch["pixel_values"])))
>>> result["rows"], result["cost"]["forwards"], result["batches"][0]["changed"]
(64, 1, 0.0)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedpeft.data.drift import TestStream
from fedpeft.data.encode import Encoded
from fedpeft.record.metrics import make_finite
from fedpeft.tta.deployed import deploy
from fedpeft.tta.method import TTAMethod, make
from fedpeft.tta.monitor import Monitor
from fedpeft.tta.parts import scores

WINDOW = 256  # rows of the window whose worst error is reported
BINS = 15


def run_stream(
    method: str | TTAMethod,
    stream: TestStream,
    model: Any,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    source: Encoded | None = None,
    monitor: Monitor | None = None,
    oracle: bool = False,
    references: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Play a stream from start to end, batch after batch, and score every prediction as it was given.

    Args:
        method: registered name (built with `options`, `seed` and `source`), or a method that goes on from its state.
        model: the source model; its own predictions are the reference for `changed` and are no part of the cost.
        monitor: watches predictions, and restarts the method if it is told to.
        oracle: restart the method where the domain changes, which no deployed method can know; the result says so.
        references: `source_answers(stream, model)`, where they are known from another run.

    Returns:
        JSON-ready: method, stream, order, oracle, seed, rows, error, nll, brier, ece, worst_window (error of the worst
        256 rows in a row), domains (error of each), classes (distinct predictions), drift (KL of the mean prediction to
        the labels' shares), cost (forwards, rows, backwards, resets, held numbers, seconds), skipped batches, alarms,
        curve (error of each batch), batches (diagnostics).
    """
    name = method if isinstance(method, str) else type(method).__name__
    played = make(method, model, options, seed, source) if isinstance(method, str) else method
    if references is None:
        references = source_answers(stream, model)
    before, seconds = played.spent(), 0.0
    predictions: list[Tensor] = []
    batches: list[dict[str, Any]] = []
    for number, batch in enumerate(stream.batches()):
        first = stream.parts[number].start
        if oracle and first and stream.domains[first] != stream.domains[first - 1]:
            played.restart()
        start = time.perf_counter()
        probs, diagnostics = played.step(batch, references[number])
        alarm = monitor.watch(played, probs) if monitor else []
        seconds += time.perf_counter() - start
        predictions.append(probs.cpu())
        batches.append({"batch": number, **diagnostics, "alarm": alarm})
    after = played.spent()
    cost = {key: after[key] - before[key] for key in after}
    result: dict[str, Any] = make_finite(
        {
            "method": name,
            "stream": stream.name,
            "order": played.config.order,
            "oracle": oracle,
            "seed": played.seed,
            **score_predictions(torch.cat(predictions), stream),
            "cost": {**cost, "held": played.held(), "seconds": round(seconds, 3)},
            "skipped": sum(entry["reason"] is not None for entry in batches),
            "alarms": sum(bool(entry["alarm"]) for entry in batches),
            "batches": batches,
        }
    )
    return result


def score_predictions(probs: Tensor, stream: TestStream) -> dict[str, Any]:
    """What labels and domains say of a stream's predictions [rows, K], given in its order."""
    wrong = probs.argmax(-1) != stream.labels
    return {
        "rows": len(probs),
        **measures(probs, stream.labels),
        "worst_window": worst_window(wrong),
        "domains": by_domain(wrong, stream.domains),
        "curve": [float(wrong[part].float().mean()) for part in stream.parts],
    }


def source_answers(stream: TestStream, model: Any) -> list[Tensor]:
    """The source model's labels [rows of the batch] for every batch of a stream."""
    plain = deploy(model)
    with torch.no_grad():
        return [plain(batch)[0].argmax(-1) for batch in stream.batches()]


def measures(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """error, nll (nats), brier (sum over classes), ece (15 equal bins), classes, drift of predictions [N, K]."""
    confidence, predicted = probs.max(-1)
    right = (predicted == labels).float()
    onehot = torch.nn.functional.one_hot(labels, probs.shape[1]).to(probs)
    shares = onehot.mean(0)
    return {
        "error": float(1 - right.mean()),
        "nll": float(-scores.log(probs.gather(1, labels[:, None])).mean()),
        "brier": float((probs - onehot).square().sum(-1).mean()),
        "ece": calibration_error(confidence, right),
        "classes": len(predicted.unique()),
        "drift": scores.divergence(probs.mean(0), shares),
    }


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error: mean over rows of |accuracy - mean confidence| of their confidence bin.

    A confidence that is not a number counts as none at all, as one broken row must not cost the stream its scores.
    """
    confidence = confidence.nan_to_num(0.0)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS).index_add(0, bins, right - confidence)
    return float(gap.abs().sum() / len(confidence))


def worst_window(wrong: Tensor, rows: int = WINDOW) -> float:
    """Largest error of `rows` consecutive rows (of all where there are fewer)."""
    total = torch.cat([torch.zeros(1), wrong.float().cumsum(0)])
    rows = min(rows, len(wrong))
    return float((total[rows:] - total[:-rows]).max() / rows)


def by_domain(wrong: Tensor, domains: list[str]) -> dict[str, float]:
    """Error of each domain, in order of appearance."""
    found: dict[str, list[bool]] = {}
    for name, error in zip(domains, wrong.tolist(), strict=True):
        found.setdefault(name, []).append(error)
    return {name: sum(errors) / len(errors) for name, errors in found.items()}
