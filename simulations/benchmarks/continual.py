"""`fedpeft bench continual`: bodies and heads on one stream of tasks, with what each keeps and costs.

A cell is one stream, body, head and seed; the seed draws the stream and the run. Heads that want the same training loss
share one training. `lda` and `ranpac` are in every table: on easy streams they win, and a table without them misleads.
Cells are files, one that is there is not run again; a training that was cut off goes on from its last checkpoint, bit
for bit. All bodies train with the stream's settings of `TRAIN` or those of --set, the same for all. What cannot be
combined has a row with the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.continual import matrix, stream
from fedpeft.continual.body import Body, TrainConfig
from fedpeft.continual.head import Head
from fedpeft.continual.learner import EVALUATE, Learner
from fedpeft.continual.model import Plastic
from fedpeft.continual.streams.base import Prepared, StreamSource
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import cells, continual_report
from fedpeft.simulations.benchmarks.cells import slug

VERSION = 1
ALWAYS = ("lda", "ranpac")
HEADS = "linear,ncm,lda,ranpac"
CHECKPOINT_EVERY = 200  # steps
SIGNALS = {"epochs": 10, "lr": 4e-3, "temperature": 3.0}
TRAIN: dict[str, dict[str, Any]] = {  # by stream; others have the defaults of TrainConfig
    "digits5": SIGNALS,
    "glyph1d": SIGNALS,
    "glyph1d_domain": SIGNALS,
    "glyph1d_blurry": {**SIGNALS, "epochs": 1},
    "glyphs": {"epochs": 5, "lr": 3e-4},
    "wordnet": {"epochs": 2, "lr": 1e-3},  # rates: on validation, of 3e-4 to 3e-3
}
QUICK: dict[str, dict[str, Any]] = {  # options of a stream that make it small
    "glyph1d": {"tasks": 4, "train": 8, "test": 5},
    "glyph1d_domain": {"train": 4, "test": 3},
    "glyph1d_blurry": {"groups": 4, "parts": 4, "train": 8, "test": 5},
    "wordnet": {"train": 8, "test": 4},
    "glyphs": {"train": 8, "test": 4},
    "records": {"limit": 200},
}
QUICK_BODIES = "frozen,sequential,coso"
Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A body or a head with options: the text that names it in tables, and what it says."""

    text: str
    name: str
    options: Row


class World:
    """The stream of one seed: its manifest, read where it is there, and its records and model, made when needed."""

    def __init__(self, name: str, source: StreamSource, seed: int, validation: bool, folder: Path) -> None:
        self.name, self.source, self.seed, self.validation = name, source, seed, validation
        self.path = folder / f"{slug(name)}-seed{seed}{'-validation' if validation else ''}.json"

    @cached_property
    def manifest(self) -> str:
        """SHA-256 of the manifest."""
        if self.path.exists():
            return _sha256(json.loads(self.path.read_text()))
        return _sha256(self.prepared.stream.manifest)

    @cached_property
    def prepared(self) -> Prepared:
        """The stream and its model.

        Raises:
            InputError: data that are not prepared, or not those of the manifest that is there.
        """
        made = self.source.build(self.seed, self.validation)
        if not self.path.exists():
            stream.save_stream(made.stream, self.path)
        elif json.loads(self.path.read_text()) != json.loads(json.dumps(made.stream.manifest)):
            raise InputError(
                f"{self.path}: {self.name} with seed {self.seed} is another stream now. Give another --out."
            )
        return made

    def learner(self, body: Entry, heads: list[Entry], train: TrainConfig) -> Learner:
        """A new learner over the shared stream and base, with this body and all these heads."""
        model = Plastic(self.prepared.base, self.prepared.layers)
        return Learner(
            self.prepared.stream,
            model,
            body.name,
            {head.name: head.options for head in heads},
            train,
            self.seed,
            body.options,
        )


def run(
    out: Path,
    name: str,
    bodies: str = "",
    heads: str = "",
    seeds: int = 3,
    quick: bool = False,
    validation: bool = False,
    settings: list[str] | None = None,
    tell: cells.Tell = cells.silent,
) -> Row:
    """Run what is missing of the table into `out`, then write results.json, plots and report.html.

    Args:
        name: a registered stream, options after a colon (glyph1d:tasks=20).
        bodies: names with commas between, options after a colon (coso:side=in,r1=4,lae); empty is all.
        heads: the same for heads; empty is `HEADS`. Those of `ALWAYS` are added.
        seeds: runs of each cell.
        quick: a small stream, one epoch, few bodies: shows that the benchmark works.
        validation: test on a part of the training set, to choose settings by.
        settings: key=value of `TrainConfig`, for all bodies.
        tell: is given a line for every finished cell.

    Raises:
        InputError: an unknown name or option, data that are not prepared, or cells in `out` of other settings.
    """
    if seeds < 1:
        raise InputError(f"--seeds: {seeds} is out of range; allowed: >= 1.")
    label, source = opened(name, quick)
    train = training(source.name, settings or [], quick)
    every = QUICK_BODIES if quick else ",".join(registry.names("bodies"))
    asked = [entry("bodies", text, "--bodies") for text in dict.fromkeys(cells.entries(bodies or every))]
    shown, added = all_heads(heads)
    rows: list[Row] = []
    progress = cells.Progress(tell, seeds * len(asked) * len(shown))
    for seed in range(seeds):
        world = World(label, source, seed, validation, out / "manifests")
        for body in asked:
            rows += body_rows(out, world, body, shown, train, progress)
    flags = [f"--seeds {seeds}", "--validation" if validation else "", "--quick" if quick else ""]
    results = {
        "version": VERSION,
        "reproduce": command_of(name, bodies, heads, settings or [], flags),
        "quick": quick,
        "validation": validation,
        "stream": label,
        "scenario": source.scenario,
        "summary_of_stream": source.summary,
        "seeds": seeds,
        "train": dataclasses.asdict(train),
        "added_heads": added,
        "versions": cells.versions(),
        "summary": continual_report.summary(rows),
        "rows": rows,
    }
    cells.write(out / "results.json", results)
    continual_report.write(out)
    return results


def command_of(name: str, bodies: str, heads: str, settings: list[str], flags: list[str]) -> str:
    """The command line that makes these results again."""
    given = [
        f"--stream {name}",
        f"--bodies {bodies}" if bodies else "",
        f"--heads {heads}" if heads else "",
        *(f"--set {text}" for text in settings),
        *flags,
    ]
    return " ".join(["fedpeft bench continual", *filter(None, given), "--out DIR"])


# What was asked -------------------------------------------------------------------------------------------------------


def opened(text: str, quick: bool) -> tuple[str, StreamSource]:
    """A stream's name with the options that are not the default, and the stream; no data are read yet."""
    name, given = cells.registered("streams", text, "--stream")
    cls = registry.load("streams", name, "--stream")
    config = configs.build(cls.Config, {**(QUICK.get(name, {}) if quick else {}), **given}, f"--stream {name}")
    source: StreamSource = cls(**dataclasses.asdict(config))
    return cells.canonical(name, config), source


def training(name: str, settings: list[str], quick: bool) -> TrainConfig:
    """The settings of all bodies: the stream's, then those given."""
    given = configs.parse_overrides(settings)
    known = [item.name for item in dataclasses.fields(TrainConfig)]
    for key in given:
        if key not in known:
            raise InputError(registry.unknown("--set", key, known))
    made: TrainConfig = configs.build(
        TrainConfig, {**TRAIN.get(name, {}), **({"epochs": 1} if quick else {}), **given}, "--set"
    )
    return made


def entry(table: str, text: str, flag: str) -> Entry:
    """An entry of a registry table, as typed.

    Raises:
        InputError: an unknown name or option, or a value out of bounds; `flag` is blamed.
    """
    return Entry(text, *cells.registered(table, text, flag))


def all_heads(text: str) -> tuple[list[Entry], list[str]]:
    """The heads asked for and those that are always there; and which of them were added."""
    asked = list(dict.fromkeys(cells.entries(text or HEADS)))
    added = [name for name in ALWAYS if name not in {cells.named(other)[0] for other in asked}]
    return [entry("heads", head, "--heads") for head in [*asked, *added]], added


def trainings(body: Entry, heads: list[Entry], scenario: str) -> list[list[Entry]]:
    """Heads that can share a training: of the same loss, unless body or stream decide it; each name once."""
    decided = registry.load("bodies", body.name).loss == "seen" or scenario in ("domain", "blurry", "free")
    groups: list[tuple[str, list[Entry]]] = []
    for head in heads:
        loss = "seen" if decided else registry.load("heads", head.name).loss
        for other, group in groups:
            if other == loss and head.name not in {member.name for member in group}:
                group.append(head)
                break
        else:
            groups.append((loss, [head]))
    return [group for _, group in groups]


# Cells ----------------------------------------------------------------------------------------------------------------


def body_rows(
    out: Path, world: World, body: Entry, heads: list[Entry], train: TrainConfig, progress: cells.Progress
) -> list[Row]:
    """The rows of one body and seed, in the order of the heads."""
    common = {
        "version": VERSION,
        "stream": world.name,
        "manifest_sha256": world.manifest,
        "validation": world.validation,
        "seed": world.seed,
        "train": dataclasses.asdict(train),
        "body": body.text,
        "body_options": _full("bodies", body),
    }
    keys = {head.text: {**common, "head": head.text, "head_options": _full("heads", head)} for head in heads}
    stem = f"{world.path.stem}-{slug(body.text)}"
    paths = {head.text: out / "cells" / f"{stem}-{slug(head.text)}.json" for head in heads}
    rows = {text: row for text, key in keys.items() if (row := cells.read(paths[text], key)) is not None}
    progress.skip(len(rows))
    for group in trainings(body, [head for head in heads if head.text not in rows], world.source.scenario):
        state = out / "state" / f"{stem}-{_sha256([keys[head.text] for head in group])[:12]}.pt"
        for text, found in trained(world, body, group, train, state).items():
            rows[text] = {**keys[text], **found}
            cells.write(paths[text], rows[text])
            progress(
                f"{world.name} seed {world.seed} {body.text} {text}: "
                + (
                    f"refused: {found['refused']}"
                    if found["refused"]
                    else f"{100 * found['metrics']['acc_micro']:.1f} % after the last task"
                )
            )
        state.unlink(missing_ok=True)
    return [rows[head.text] for head in heads]


def trained(world: World, body: Entry, heads: list[Entry], train: TrainConfig, state: Path) -> dict[str, Row]:
    """What every head has at the end of one training that goes on from `state` where that is there; or why not."""
    tasks = world.prepared.stream.tasks
    refused: dict[str, str] = {}
    for head in heads:
        try:
            world.learner(body, [head], train)
        except InputError as error:
            refused[head.text] = str(error)
    fit = [head for head in heads if head.text not in refused]
    done: dict[str, Row] = {}
    if fit:
        learner = world.learner(body, fit, train)
        before = {head.text: initial(learner, head) for head in fit}
        if resumed := state.exists():
            learner.resume(state)
        try:
            learner.run(state, CHECKPOINT_EVERY)
        except InputError as error:
            return {**{head.text: {"refused": str(error)} for head in fit}, **_refusals(refused)}
        ledger = [{key: value for key, value in entry.items() if key != "head_bytes"} for entry in learner.ledger]
        tests = [len(task.test) for task in tasks]
        records = None if world.prepared.stream.boundaries else [len(task.train) for task in tasks]
        for head in fit:
            right = learner.right[head.name]
            found = matrix.summary(right, tests, before[head.text], records)
            done[head.text] = {
                "refused": None,
                "right": right,
                "tests": tests,
                "initial": before[head.text],
                "records": records,
                "tasks": [task.name for task in tasks],
                "metrics": found["values"],
                "undefined": found["undefined"],
                "ledger": ledger,
                "head_bytes": head_bytes(learner, head),
                "resumed": resumed,
                "shared_with": [other.text for other in fit if other is not head],
            }
    return {**done, **_refusals(refused)}


def initial(learner: Learner, head: Entry) -> list[int] | None:
    """Right answers of the untrained classifier on every task's test set; None where that means nothing.

    Only a domain stream has all classes from the start, and a head that is fitted on sums has none yet.
    """
    if learner.stream.scenario != "domain" or not is_classifier(learner, head):
        return None
    return [
        sum(
            int((learner.classifier(learner.model.features(inputs)).argmax(-1) == labels).sum())
            for inputs, labels in learner.body.each_batch(task.test, EVALUATE)
        )
        for task in learner.stream.tasks
    ]


def head_bytes(learner: Learner, head: Entry) -> int:
    """Bytes of a head's sums in all views, or of the trained classifier where that is the head."""
    kept = [value for view in learner.heads[head.name].values() for value in view.sums.values()]
    if is_classifier(learner, head):
        kept += [learner.classifier.weight, learner.classifier.bias]
    return sum(value.numel() * value.element_size() for value in kept)


def is_classifier(learner: Learner, head: Entry) -> bool:
    """Whether a head is the classifier that was trained beside the body: neither it nor the body has its own scores."""
    own = type(learner.body).predict is not Body.predict
    return not own and registry.load("heads", head.name).statistics is Head.statistics


def _refusals(reasons: dict[str, str]) -> dict[str, Row]:
    return {text: {"refused": reason} for text, reason in reasons.items()}


def _full(table: str, given: Entry) -> Row:
    """All options, the defaults too: a row says what it was run with."""
    cls = registry.load(table, given.name)
    known = configs.options_of(cls, configs.LEARNER)
    built: Any = configs.build(cls.Config, {known[key].name: value for key, value in given.options.items()}, given.text)
    return {key: getattr(built, item.name) for key, item in known.items()}


def _sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
