"""Records whose answers a trained model is to give: read from a file without the column that training needs.

A conversation ends where the assistant has to speak: one whose last turn is the assistant's loses it, and a question
without an answer is one as it stands. A model that was trained on plain texts goes on with the text itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.config import DataConfig
from fedpeft.data import columns, photos, readers, skipped, tables, tagged
from fedpeft.data.conversations import FORMS, Form, Malformed, Turn, dump_turns
from fedpeft.data.ragged import Texts
from fedpeft.data.reading import Reading, parse_format
from fedpeft.data.records import Records
from fedpeft.data.wording import Wording
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective

ANSWERS = {"alpaca": "output", "completion": "completion", "qa": "answer"}  # what a question need not have, by form
LISTS: dict[str, dict[str, str]] = {
    "messages": {"role": "assistant", "content": "."},
    "sharegpt": {"from": "gpt", "value": "."},
}


def read_unanswered(
    path: Path,
    config: DataConfig,
    task: str,
    names: list[str],
    form: str | None,
    splits: Mapping[str, str] | None = None,
) -> Records:
    """The records of a file or folder, in their order. Labels, if there are any, are not looked at.

    The column `file` has the names of pictures, from `path` on.

    Args:
        config: of the run, for its columns and `format`.
        names: outputs of the head.
        form: of the conversations that a language model was trained on ("text" is none); None where nobody knows.
        splits: key of `data` -> the one of several sets of records in `path` that is meant; the run's own are of
            another source.

    Raises:
        InputError: no such file, several sets of records, no column of texts or images, or a record without one; names
            it.
    """
    table = _read_unanswered(path, config, splits or {})
    objective = load_objective(task)
    count = len(next(iter(table.columns.values())))
    inputs, kind = _read_inputs(table, config, task, form)
    targets = None
    if objective.labelled in ("numbers", "several"):
        targets = np.zeros((count, len(names)), np.float32 if objective.labelled == "numbers" else bool)
    if objective.labelled == "tags":  # a word's number is its tag, by which it is found again among the tokens
        names = [str(place) for place in range(max(len(json.loads(str(text))[0]) for text in inputs))]
    wording = Wording.of(config, kind) if objective.says == "answers" else Wording()
    files = _name_files(table, config, path) if objective.records == "image" else {}
    return Records(inputs, np.zeros(count, np.int64), names, files, objective.records, wording=wording, targets=targets)


def _read_unanswered(path: Path, config: DataConfig, splits: Mapping[str, str]) -> tables.Table:
    """All there is, or what is named; what is left out is said."""
    if not path.exists():
        raise InputError(f"--data {path}: there is no such file or folder.")
    if len(splits) > 1:
        chosen = " and ".join(f"data.{key}={name}" for key, name in splits.items())
        raise InputError(f"{chosen}: one set of records is answered at a time. Name one of them.")
    written = path.is_file() and readers.ending_of(path) in readers.CSV
    key, name = next(iter(splits.items()), ("train_split", None))
    form = parse_format(config.format) if written else {}
    found = tables.local(str(path), reading=Reading(form, train_split=name, train_key=key, asked=True))
    if found.test is not None:
        raise InputError(
            f"--data {path}: has a training set, {found.train.where}, and a test set, {found.test.where}. Name one of "
            "them: by its own path, or with data.train_split=NAME."
        )
    skipped.say(found.train.skipped)
    return found.train


def _name_files(table: tables.Table, config: DataConfig, path: Path) -> dict[str, np.ndarray]:
    """The names of pictures, as a column; none where they have no names."""

    def name(value: Any) -> str:
        text = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(text, str):
            return ""
        place = str(Path(text).relative_to(path)) if Path(text).is_relative_to(path) else text
        return place.encode(errors="backslashreplace").decode()  # a name need not be UTF-8

    names = list(map(name, table.columns[columns.column(table, "image", config.image)]))
    return {"file": np.array(names, dtype=object)} if any(names) else {}


def _read_inputs(table: tables.Table, config: DataConfig, task: str, form: str | None) -> tuple[Any, str]:
    """What a model is given of each record, and the form of conversations."""
    objective = load_objective(task)
    if objective.records == "image":
        name = columns.column(table, "image", config.image)
        inputs, _, damaged = photos.open_column(table.columns[name], f"{table.where}: column {name}", table.folder)
        if damaged:
            raise InputError(
                f"{table.where}: column {name}: {'; '.join(map(str, damaged[0].examples[:1]))}: a picture that cannot "
                "be decoded has no answer. Remove or mend it."
            )
        return inputs, "text"
    if objective.labelled == "tags":
        return _read_words(table, config), "text"
    if objective.says == "answers" and form != "text" and config.text is None:
        found = _find_asked(table, config.columns, form)
        if found is not None:
            return Texts.of([dump_turns(turns) for turns in _read_questions(table, *found)]), found[0].name
    texts = columns.texts(table, columns.column(table, "text", config.text))
    if objective.says == "answers" and (form not in (None, "text") or objective.encoder_decoder):
        return Texts.of([dump_turns([("user", str(text))]) for text in texts]), form or "qa"
    return texts, "text"


def _read_words(table: tables.Table, config: DataConfig) -> Texts:
    """Words of each record, and their numbers as tags."""
    name = tagged.find_column(table, "text", config.text)
    rows = []
    for number, words in enumerate(table.columns[name], 1):
        if not isinstance(words, list | tuple | np.ndarray) or not len(words):
            raise InputError(
                f"{table.where}: record {number} has {columns.show_value(words)} in column {name}; it must be a list "
                "of words."
            )
        wrong = next((word for word in words if not isinstance(word, str) or not word.strip()), None)
        if wrong is not None:
            raise InputError(
                f"{table.where}: column {name}: record {number} has {columns.show_value(wrong)} as a word."
            )
        columns.require_unicode(table, name, number, " ".join(words))
        rows.append(json.dumps([list(words), [str(place) for place in range(len(words))]], ensure_ascii=False))
    return Texts.of(rows)


def _find_asked(
    table: tables.Table, given: Mapping[str, Any], wanted: str | None
) -> tuple[Form, dict[str, str]] | None:
    """The form of a table's questions, and what it has -> column; None where no column is one's."""
    by_name = {name.strip().lower(): name for name in table.columns}
    fits: dict[str, tuple[Form, dict[str, str]]] = {}
    for form in FORMS[1:]:  # the first, preferences, asks nothing
        needed = [key for key in form.needed if key != ANSWERS.get(form.name)]
        every = {**form.needed, **form.optional}
        usual = {key: next((by_name[name] for name in every[key] if name in by_name), None) for key in every}
        named = {key: given.get(key) for key in every} if given else usual
        held = {key: str(name) for key, name in named.items() if name in table.columns}
        if set(needed) <= held.keys():
            fits[form.name] = (form, held)
    if wanted in fits or len(fits) < 2:
        return fits.get(str(wanted)) or next(iter(fits.values()), None)
    several = " or in ".join(", ".join(held.values()) for _, held in fits.values())
    raise InputError(
        f"{table.where}: what is asked could be in {several}. Name the column with data.text=NAME, or all with "
        "data.columns."
    )


def _read_questions(table: tables.Table, form: Form, held: Mapping[str, str]) -> list[list[Turn]]:
    """The turns of each record up to where the assistant has to speak."""
    answer = ANSWERS.get(form.name)
    turns: list[list[Turn]] = []
    for number in range(len(next(iter(table.columns.values())))):
        row = {key: table.columns[name][number] for key, name in held.items()}
        if answer is not None:
            # The form asks for one, and the turns end before it.
            row[answer] = "."
        else:
            key = next(iter(form.needed))
            row[key] = _with_answer(row[key], LISTS[form.name])
        try:
            read = form.read(row)
        except Malformed as error:
            raise InputError(
                f"{table.where}: record {number + 1} asks nothing in the columns {', '.join(held.values())}: {error}."
            ) from error
        turns.append([*read[: max(place for place, (role, _) in enumerate(read) if role == "assistant")]])
    return turns


def _with_answer(value: Any, answer: Mapping[str, str]) -> Any:
    """Turns that end with the assistant; what is no list of turns stays what it is."""
    (role_key, role), _ = answer.items()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return value
    last = value[-1]
    if isinstance(last, Mapping) and last.get(role_key) in ("assistant", role):
        return value
    return [*value, answer]
