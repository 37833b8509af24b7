"""Labelled records from an embedded or prepared data set, a file, a folder or a hub id; training and test set.

>>> from fedpeft.config import DataConfig
>>> train, test = load(DataConfig(source="digits", limit=100), "image-classification", seed=0)
>>> train.inputs.shape, len(test), test.label_names[3]
((100, 8, 8, 1), 100, '3')
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft import registry, seeds
from fedpeft.config import DataConfig
from fedpeft.data import answers, columns, conversations, photos, prepare, skipped, tables, tagged
from fedpeft.data.cache import Cache, hash_code, hash_content
from fedpeft.data.partition import group_alike
from fedpeft.data.ragged import Texts
from fedpeft.data.readers import ending_of
from fedpeft.data.reading import Reading
from fedpeft.data.records import Records, open_records, save_records
from fedpeft.data.skipped import Skipped, note_skipped
from fedpeft.data.wording import Wording
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective


def load(config: DataConfig, task: str, seed: int, cache: Cache | None = None) -> tuple[Records, Records]:
    """Training and test records of a config.

    The test set is `config.test`, else the source's own test split, else a stratified `config.test_fraction`. With
    `config.limit` both are stratified samples of at most that size. Every choice derives from `seed`.

    What the source has besides is said once, and stands in both sets' `skipped`.

    Args:
        cache: where what was read of large files is kept for other processes and later runs.

    Raises:
        InputError: nothing of that name, a column that is missing, a record without text, image or label, a single
            class, a label that only the test set has, or data of another kind than `task` needs.
    """
    _require_pictures(config, task)
    train, test = _read_source(config.source, "data.source", config, task, cache)
    if config.labels:
        train = _align_labels(train, config.labels, "data.source", "data.labels")
    notes = train.skipped if test is None or config.test is not None else train.skipped + test.skipped
    if load_objective(task).classes:
        _require_classes(train, config)
    if config.test is not None:
        first, second = _read_source(config.test, "data.test", config, task, cache)
        test = _align_labels(second or first, train.label_names)
        notes += test.skipped
        if Path(config.test).is_file() and Path(config.test).resolve() == Path(config.source).resolve():
            what = "records of the test set are those that are learned from, so a score is none of what is new"
            notes += (Skipped("data.test", what, len(test), len(test)),)
    elif test is not None:
        test = _align_labels(test, train.label_names)
    else:
        train, test = _hold_out(train, config.test_fraction, seed)
    if (train.wording.form == "text") != (test.wording.form == "text"):
        kinds = [
            f"{which} {'plain texts' if part.wording.form == 'text' else 'conversations'}"
            for which, part in (("the training set has", train), ("the test set has", test))
        ]
        raise InputError(f"data.test: {', '.join(kinds)}; a score would be of something else than what is learned.")
    if config.limit is not None:
        train = _limit_records(train, config.limit, seed, "train")
        test = _limit_records(test, config.limit, seed, "test")
    unseen = np.setdiff1d(test.labels, train.labels)
    if len(unseen):
        names = ", ".join(f"'{train.label_names[label]}'" for label in unseen[:5])
        raise InputError(
            f"{config.test or config.source}: the test set has labels that no training record has: {names}"
            f"{' and more' if len(unseen) > 5 else ''}. Remove them, or raise data.limit if that is set."
        )
    skipped.say(notes)
    return replace(train, skipped=notes, augment=tuple(config.augment)), replace(test, skipped=notes)


def _require_pictures(config: DataConfig, task: str) -> None:
    if config.augment and (kind := load_objective(task).records) != "image":
        raise InputError(
            f"data.augment={config.augment} is for pictures; model.task={task} takes {kind}s. Set it to []."
        )


def _require_classes(records: Records, config: DataConfig) -> None:
    """Refuse what holds one class only: whoever always says it is always right."""
    found = np.unique(records.labels)
    if len(found) == 1:
        raise InputError(
            f"data.source: the {len(records)} records of {config.source} have one class only, the label "
            f"'{records.label_names[found[0]]}'. A classifier needs records of at least two; is data.label the right "
            "column?"
        )


def whole(
    source: str, key: str, config: DataConfig, task: str, test: bool = False, cache: Cache | None = None
) -> Records:
    """All records of one source, or of its own test split where it has one and `test` is set; nothing is held out.

    Raises:
        InputError: as `load`; and a label that is not among `config.labels`.
    """
    _require_pictures(config, task)
    train, own = _read_source(source, key, config, task, cache)
    records = replace(own if test and own is not None else train, augment=tuple(config.augment))
    skipped.say(records.skipped)
    return _align_labels(records, config.labels, key, "data.labels") if config.labels else records


def _read_source(
    source: str, key: str, config: DataConfig, task: str, cache: Cache | None
) -> tuple[Records, Records | None]:
    """The source's training and test records, labels by its own names."""
    entry = registry.load("datasets", source, key) if source in registry.names("datasets") else None
    if isinstance(entry, type):
        chosen = {
            name: getattr(config, name) for name in ("text", "image", "label", "columns") if getattr(config, name)
        }
        if chosen and key == "data.source":
            raise InputError(
                f"data.{next(iter(chosen))}: the embedded data set {source} has fixed columns. Set it to null."
            )
        Reading.of(config, key).require("an embedded data set", source)
        dataset = entry()
        _require_kind(dataset.kind, task, f"{key}={source}")
        has, needed = getattr(dataset, "labelled", "class"), load_objective(task).labelled
        if needed != has and (needed != "none" or has == "pairs"):
            raise InputError(
                f"{key}={source}: its records have {answers.WORDS[has]}, and model.task={task} learns "
                f"{answers.WORDS[needed]}. Name a file that has them."
            )
        train, test = dataset.load()
        wording = Wording.of(config, train.wording.form)
        return replace(train, wording=wording), replace(test, wording=wording)
    if cache is not None and load_objective(task).records == "text" and Path(source).is_file():
        name, size = hash_content(Path(source))
        if size >= cache.least:
            return _read_cached(source, name, config, task, cache, Reading.of(config, key)), None
    reading = Reading.of(config, key)
    found = _read_tables(source, key, reading) if entry is None else tables.made(entry, source, key, reading)
    train = _build_records(found.train, config, task, cache)
    return train, None if found.test is None else _build_records(found.test, config, task, cache)


def _read_cached(source: str, name: str, config: DataConfig, task: str, cache: Cache, reading: Reading) -> Records:
    """Records of texts in a file, as they were read before of a file with this content."""
    objective = load_objective(task)
    facts = {
        "content": name,
        "format": reading.format,
        "ending": ending_of(Path(source)),  # says how it is read; where it lies does not matter
        "columns": [config.text, config.label, config.partition.options.get("column"), config.columns, config.skip_bad],
        "objective": [objective.labelled, objective.says, objective.encoder_decoder, config.label_separator],
        "code": hash_code(),
    }

    def make(folder: Path) -> dict[str, Any]:
        records = _build_records(tables.local(source, folder, reading).train, config, task)
        return {**save_records(records, folder), "source": str(Path(source))}

    reading.require_file(source)
    kept = cache.get("records", facts, make)
    if kept is None:
        return _build_records(tables.local(source, reading=reading).train, config, task)
    records = open_records(*kept)
    notes = tuple(
        replace(note, where=note.where.replace(kept[1]["source"], str(Path(source)))) for note in records.skipped
    )
    return replace(records, wording=Wording.of(config, records.wording.form), skipped=notes)


def _read_tables(source: str, key: str, reading: Reading) -> tables.Tables:
    # A file named so is meant by its own path: debian/da is a part of a prepared set, debian/mine.csv none.
    if prepare.canonical(source.partition("/")[0]) in prepare.RECIPES and not Path(source).is_file():
        reading.require("a prepared data set", source)
        return prepare.read(source)
    if tables.is_local(source, key):
        if (prepared := prepare.read_folder(Path(source))) is not None:
            reading.require("a prepared data set", source)
            return prepared
        return tables.local(source, reading=reading)
    try:
        return tables.hub(source, reading)
    except tables.NotOnHub as error:
        known = [*registry.names("datasets"), *prepare.RECIPES]
        hint = registry.unknown(key, source, known)
        raise InputError(
            f"{hint} It is no local file or folder either, and not to be had from the hub: {error}"
        ) from error


def _build_records(table: tables.Table, config: DataConfig, task: str, cache: Cache | None = None) -> Records:
    objective = load_objective(task)
    kind = objective.records
    columns.require_named(table, {"text": config.text, "image": config.image, "label": config.label})
    if kind == "image":
        _require_kind(kind if columns.find_column(table, "image", config.image) else "text", task, table.where)
    if objective.says == "answers" and config.text is None:
        known = (config.label, config.partition.options.get("column"))
        forms = conversations.PAIRS if objective.labelled == "pairs" else conversations.FORMS
        form = conversations.find_form(list(table.columns), config.columns, table.where, known, forms)
        conversations.require_form(form and form[0], task, table.where)
        if form is not None:
            return _build_conversations(table, *form, config)
    if objective.labelled == "tags":
        return replace(tagged.read(table, config), wording=Wording.of(config, "text"))
    name = columns.column(table, kind, config.image if kind == "image" else config.text)
    targets, label = None, config.label
    if objective.labelled in answers.KINDS:
        label = columns.column(table, "label", config.label)
        targets, label_names, notes = answers.read(objective.labelled, table, label, config.label_separator)
        labels = np.zeros(len(targets), dtype=np.int64)
    else:
        label, labels, label_names, notes = _read_labels(table, config, objective.classes)
    if objective.says == "answers" and config.text is None:
        columns.require_whole_texts(table, name, (label, config.partition.options.get("column")))
    what = f"{table.where}: column {name}"
    inputs: Any
    if kind == "image":
        inputs, kept, damaged = photos.open_column(table.columns[name], what, table.folder, cache)
        labels, notes = labels[kept], notes + damaged
    else:
        inputs, kept = columns.texts(table, name), np.arange(len(labels))
    natural = columns.Natural.of(
        {other: values for other, values in table.columns.items() if other not in (name, label)}
    )
    if len(kept) < len(table.columns[name]):
        natural = natural.take(kept)
    wording = Wording.of(config, "text")
    return Records(inputs, labels, label_names, natural, kind, table.skipped + notes, wording, targets=targets)


def _build_conversations(
    table: tables.Table, form: conversations.Form, held: dict[str, str], config: DataConfig
) -> Records:
    """Records of conversations; those that are none are left out with `data.skip_bad`."""
    texts, kept, bad = conversations.read_rows(table.columns, form, held, table.where, config.skip_bad)
    label, labels, label_names, notes = _read_labels(table, config, needed=False)
    others = {name: values for name, values in table.columns.items() if name not in (*held.values(), label)}
    rows = np.array(kept)
    left_out = note_skipped(table.where, "records are no conversation and are left out", bad, len(labels))
    return Records(
        Texts.of(texts),
        labels[rows],
        label_names,
        columns.Natural.of(others).take(rows),
        "text",
        table.skipped + notes + left_out,
        Wording.of(config, form.name),
    )


def _read_labels(
    table: tables.Table, config: DataConfig, needed: bool
) -> tuple[str | None, np.ndarray, list[str], tuple[Skipped, ...]]:
    """Column, indices and names of the labels, and what is to be said of them.

    Where none are needed, a column that has only the name of labels is left alone if it holds others.
    """
    none = np.zeros(len(next(iter(table.columns.values()))), dtype=np.int64)
    if needed:
        name = columns.column(table, "label", config.label)
        return (name, *columns.labels(table, name))
    found = columns.find_column(table, "label", config.label)
    if found is None:
        return None, none, ["all"], ()
    try:
        return (found, *columns.labels(table, found))
    except InputError as error:
        if config.label is not None:
            raise
        note = Skipped(table.where, f"labels are not read: a language model needs none ({error})", len(none), len(none))
        return None, none, ["all"], (note,)


def _require_kind(kind: str, task: str, where: str) -> None:
    needed = load_objective(task).records
    if kind != needed:
        tasks = [other for other in registry.names("objectives") if load_objective(other).records == kind]
        raise InputError(
            f"model.task={task} needs {needed} data; {where} has {kind}s. Tasks for {kind}s: {', '.join(tasks)}."
        )


def _align_labels(
    records: Records, label_names: list[str], what: str = "test set", where: str = "the training set"
) -> Records:
    """The same records with labels as indices into another list of names."""
    if records.targets is not None:
        return answers.align(records, label_names, what, where)
    position = {name: index for index, name in enumerate(label_names)}
    used = np.unique(records.labels)
    unknown = [records.label_names[label] for label in used if records.label_names[label] not in position]
    if unknown:
        raise InputError(
            f"{what}: the labels {', '.join(repr(name) for name in unknown[:5])} are not in {where}, "
            f"which has {', '.join(label_names[:20])}."
        )
    table = np.zeros(len(records.label_names), dtype=np.int64)
    for label in used:
        table[label] = position[records.label_names[label]]
    return replace(records, labels=table[records.labels], label_names=label_names)


def _hold_out(records: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    order, rank = _order_stratified(records.labels, seed, "test")
    candidates = order[rank[order] > 0]  # one record of every class stays in the training set
    count = min(round(fraction * len(records)), len(candidates))
    if count == 0:
        raise InputError(
            f"data.test_fraction={fraction}: {len(records)} records leave nothing to test on. Give data.test."
        )
    chosen = np.zeros(len(records), dtype=bool)
    chosen[candidates[:count]] = True
    return records.take(np.flatnonzero(~chosen)), records.take(np.flatnonzero(chosen))


def _limit_records(records: Records, limit: int, seed: int, which: str) -> Records:
    """At most `limit` records, every class with at least one if there is room."""
    if len(records) <= limit:
        return records
    order, rank = _order_stratified(records.labels, seed, f"limit {which}")
    order = np.concatenate([order[rank[order] == 0], order[rank[order] > 0]])
    return records.take(np.sort(order[:limit]))


def _order_stratified(labels: np.ndarray, seed: int, purpose: str) -> tuple[np.ndarray, np.ndarray]:
    """A random order whose every prefix has the whole's class shares, and each record's rank within its class."""
    rng = seeds.numpy_generator(seed, "data", purpose)
    place, rank = np.zeros(len(labels)), np.zeros(len(labels), dtype=np.int64)
    for alike in group_alike(labels):
        members = rng.permutation(alike)
        rank[members] = np.arange(len(members))
        # Anywhere in its first step, or the first record of every class, however rare, would come before all others.
        place[members] = (rank[members] + rng.random()) / len(members)
    return np.argsort(place, kind="stable"), rank
