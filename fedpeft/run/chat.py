"""Questions, a line each, and the answers of a trained language model, a line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from fedpeft.data.conversations import Turn
from fedpeft.errors import InputError
from fedpeft.run.generations import generate_answers
from fedpeft.run.predict import Asker
from fedpeft.run.trained import Trained


def require_settings(overrides: Sequence[str]) -> None:
    """Refuse a question in the place of overrides."""
    for text in overrides:
        if "=" not in text:
            raise InputError(
                f"'{text}': behind the model stand overrides, key=value. Questions are lines of the input: type them "
                "once it runs, or pipe them in (echo 'QUESTION' | fedpeft chat MODEL)."
            )


def require_language_model(trained: Trained, history: bool) -> None:
    """Refuse a model that generates nothing, and earlier turns for one that reads one question."""
    if trained.base.objective.says != "answers":
        raise InputError(
            f"model.task={trained.config.model.task}: only language models answer in words. `fedpeft predict` says "
            "what this model says of the records of a file."
        )
    if history and trained.base.objective.encoder_decoder:
        raise InputError(
            f"--history: model.task={trained.config.model.task} reads one question at a time, and was trained on no "
            "earlier turns. Leave it out."
        )


def answers(
    trained: Trained, lines: Iterable[str], most: int, history: bool, refuse: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, and its answer, as soon as it is read; greedy, on one line.

    Args:
        lines: bytes that are no UTF-8 as Python's surrogateescape keeps them.
        most: tokens of an answer.
        history: earlier questions and answers are part of the next question, until a blank line.
        refuse: is told why a line has no answer; its answer is empty then, so that answers stay beside their lines.
    """
    # A run over plain texts goes on with the line itself.
    asker = Asker.of(trained, trained.form or "qa")
    earlier: list[Turn] = []
    for number, line in enumerate(lines, 1):
        question = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
        if not question:
            earlier = []
            continue
        turns = [*earlier, ("user", question)]
        try:
            _require_utf8(line, number)
            ids = asker.ask(turns if asker.template else question, f"line {number}")
            (said,) = generate_answers(trained.base, [ids], most, asker.stop)
        except InputError as error:
            refuse(str(error))
            yield question, ""
            continue
        yield question, " ".join(said.split())
        if history and said:
            earlier = [*turns, ("assistant", said)]


def _require_utf8(line: str, number: int) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = f", but has the byte 0x{ord(line[error.start]) & 0xFF:02x}"
        raise InputError(f"line {number}: is not UTF-8{byte}. Write it as UTF-8.") from error
