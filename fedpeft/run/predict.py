"""What a trained model says of the records of a file: a row for each, in their order, as csv or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedpeft import progress
from fedpeft.config import parse_overrides
from fedpeft.data import templates
from fedpeft.data.conversations import parse_turns
from fedpeft.data.encode import encode
from fedpeft.data.ragged import cut_runs
from fedpeft.data.reading import SPLITS
from fedpeft.data.records import Records
from fedpeft.data.templates import NotWritten, Template
from fedpeft.data.unanswered import read_unanswered
from fedpeft.errors import InputError
from fedpeft.files import write_bytes
from fedpeft.run.fill import fill_in
from fedpeft.run.generations import count_positions, generate_answers
from fedpeft.run.trained import Trained, open_trained

ENDINGS = (".jsonl", ".csv")
RECORDS, TOKENS = 64, 2**13  # of a pass
BLOCK = 64  # questions that are answered between two signs of life


def predict(
    path: str | Path,
    data: str | Path,
    out: str | Path,
    overrides: Sequence[str] | dict[str, Any] = (),
    most: int = 64,
) -> dict[str, Any]:
    """Answer every record of a file.

    Args:
        path: a run, or an adapter folder.
        out: .csv or .jsonl, not there yet.
        overrides: `key=value`, or a mapping of dotted keys, over the run's config.
        most: tokens of a generated answer.

    Raises:
        InputError: the model, the file or `out` cannot be used; nothing is written.
    """
    path, data, out = Path(path), Path(data), Path(out)
    if most < 1:
        raise InputError(f"--max-new-tokens {most}: an answer needs room for 1 token at least.")
    if out.suffix not in ENDINGS:
        raise InputError(f"--out {out}: ends in {out.suffix or 'nothing'}; allowed are {' and '.join(ENDINGS)}.")
    if out.exists():
        raise InputError(f"--out {out}: is there already, and is not written over. Name another file, or remove it.")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent} to write it to.")
    trained = open_trained(path, overrides)
    objective, config = trained.base.objective, trained.config
    given = parse_overrides(overrides).keys() & {"data", *(f"data.{key}" for key in SPLITS)}
    values = {key: getattr(config.data, key) for key in SPLITS if given & {"data", f"data.{key}"}}
    splits = {key: value for key, value in values.items() if value is not None}
    records = read_unanswered(data, config.data, config.model.task, trained.names, trained.form, splits)
    ways: dict[str, Callable[[Trained, Records], list[dict[str, Any]]]] = {
        "labels": classify,
        "answers": partial(answer, most=most),
        "hidden words": fill_in,
    }
    rows = ways[objective.says](trained, records)
    files = [{"file": name} for name in records.columns.get("file", ())] or [{}] * len(rows)
    numbered = [
        {"record": number, **file, **row} for number, (file, row) in enumerate(zip(files, rows, strict=True), 1)
    ]
    write_bytes(out, (_as_csv(numbered) if out.suffix == ".csv" else _as_lines(numbered)).encode())
    return {"records": len(numbered), "task": config.model.task, "out": str(out)}


@torch.no_grad()
def classify(trained: Trained, records: Records) -> list[dict[str, Any]]:
    """What the model's objective says of each record (`Objective.say`)."""
    base = trained.base
    encoded = encode(records, base.processor, base.task, trained.config.model.max_length, "records")
    device = next(base.backbone.parameters()).device
    said: dict[int, dict[str, Any]] = {}
    for places in cut_runs(encoded.lengths, RECORDS, TOKENS):
        inputs, labels = encoded.batch(places)
        scores = base.forward({name: value.to(device) for name, value in inputs.items()}).float().cpu()
        texts = [records.inputs[place] for place in places] if records.kind == "text" else [None] * len(places)
        said |= zip(places.tolist(), base.objective.say(scores, labels, trained.names, texts), strict=True)
        progress.step("records", len(said), len(records))
    return [said[place] for place in range(len(records))]


def answer(trained: Trained, records: Records, most: int) -> list[dict[str, Any]]:
    """Generated answers, greedily, to the questions of records."""
    asker = Asker.of(trained, records.wording.form)
    prompts = [
        asker.ask(parse_turns(text) if asker.template else text, f"record {number}")
        for number, text in enumerate(records.inputs, 1)
    ]
    said: list[str] = []
    for start in range(0, len(prompts), BLOCK):
        said += generate_answers(trained.base, prompts[start : start + BLOCK], most, asker.stop)
        progress.step("records", len(said), len(prompts))
    return [{"answer": text} for text in said]


class Asker:
    """Makes prompts of what is asked, by the template that the model was trained with; of plain texts there is none."""

    def __init__(self, trained: Trained, template: Template | None) -> None:
        self.tokenizer, self.template = trained.base.processor, template
        self.longest, self.positions = trained.config.model.max_length, count_positions(trained.base)
        end = self.tokenizer.eos_token_id
        self.stop = templates.find_ends(template, self.tokenizer) if template else [] if end is None else [end]

    @classmethod
    def of(cls, trained: Trained, form: str) -> Asker:
        """For records of a form; "text" is none."""
        found = None
        if form != "text":
            encoder = trained.base.objective.encoder_decoder
            found = templates.find_template(trained.config.data.template, form, trained.base.processor, encoder)
        return cls(trained, found)

    def ask(self, asked: Any, what: str) -> list[int]:
        """Tokens of a prompt: of turns, or of a text that is gone on with.

        Raises:
            InputError: the template does not take the turns, or there is no room for an answer; `what` is blamed.
        """
        if self.template is None:
            ids = self.tokenizer(asked, verbose=False)["input_ids"]
            if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text
                ids = ids[:-1]
        else:
            try:
                _, ids = self.template.ask(asked, self.tokenizer)
            except NotWritten as error:
                raise InputError(f"{what}: {error}.") from error
        if not 0 < len(ids) <= self.longest:
            raise InputError(
                f"{what}: has {len(ids)} tokens as a prompt; model.max_length={self.longest} is the most. Shorten it, "
                "or give model.max_length=N if the model takes more."
            )
        encoder = self.template is not None and self.template.encoder
        # What an encoder reads may fill all positions, as the answer has its own: True counts 1.
        if self.positions is not None and len(ids) >= self.positions + encoder:
            raise InputError(
                f"{what}: has {len(ids)} tokens as a prompt, which leave no room for an answer: the model has "
                f"{self.positions} positions. Shorten it."
            )
        return list(ids)


def _as_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Numbers by name are columns of these names; a list is JSON."""
    flat = [dict(_flatten_row(row)) for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flatten_row(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{key}: {name}", number) for name, number in value.items())
        else:
            yield key, json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
