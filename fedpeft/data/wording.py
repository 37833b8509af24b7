"""What the section `data` says of a language model's texts: template, what is learned, what is cut; and its checks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fedpeft import registry
from fedpeft.config import default_of
from fedpeft.data.conversations import as_key
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective

if TYPE_CHECKING:
    from fedpeft.config import Config, DataConfig

TEMPLATES = ("alpaca", "chatml", "plain", "vicuna")  # of `fedpeft.data.templates`
OF_DECODERS = ("chatml", "vicuna")
OF_LANGUAGE_MODELS = ("columns", "template", "loss_on", "truncate", "skip_bad")  # keys of `data`


@dataclass(frozen=True)
class Wording:
    """What becomes of a language model's records on their way to tokens, as the section `data` says it.

    Attributes:
        form: of the conversations, a name of `FORMS`; "text" where records are plain texts.
        template, loss_on, truncate, skip_bad: of the section.
    """

    form: str = "text"
    template: str | None = None
    loss_on: str = "response"
    truncate: str = "end"
    skip_bad: bool = False

    @classmethod
    def of(cls, config: DataConfig, form: str) -> Self:
        """That of a config, for records of a form."""
        return cls(form, config.template, config.loss_on, config.truncate, config.skip_bad)


def check(config: Config) -> None:
    """Refuse what `data` says of language models' texts for a task that is none, and a template that is not there."""
    data, task = config.data, config.model.task
    if load_objective(task).says != "answers":
        said = {item.name: item for item in fields(data) if item.name in OF_LANGUAGE_MODELS}
        for name, item in said.items():
            if getattr(data, name) != default_of(item):
                raise InputError(
                    f"data.{name}={getattr(data, name)}: of language models' texts; model.task={task} is not trained "
                    "on them. Leave it out, or set model.task=causal-lm."
                )
        for key, value, default in (
            ("client.loss_weighting", config.client.loss_weighting, "record"),
            ("evaluation.generate.records", config.evaluation.generate.records, 0),
        ):
            if value != default:
                raise InputError(f"{key}={value}: of language models; model.task={task} is none. Set it to {default}.")
    _check_pairs(config)
    _check_halves(config)
    if data.columns and data.text is not None:
        raise InputError(
            f"data.text={data.text} and {as_key(data.columns)}: one is for plain texts, the other for conversations. "
            "Leave one of them out."
        )
    require_template(data.template)


def _check_pairs(config: Config) -> None:
    """Refuse what means nothing where two answers are compared as wholes."""
    if load_objective(config.model.task).labelled != "pairs":
        return
    for key, value, allowed in (
        ("data.text", config.data.text, None),
        ("data.loss_on", config.data.loss_on, "response"),
        ("client.loss_weighting", config.client.loss_weighting, "record"),
    ):
        if value != allowed:
            way = "null" if allowed is None else allowed
            raise InputError(
                f"{key}={value}: model.task={config.model.task} compares the two answers of each record as wholes, by "
                f"the sums of their tokens. Set it to {way}."
            )


def _check_halves(config: Config) -> None:
    """Refuse what means nothing where an encoder reads what is asked, and only answers are learned."""
    data, task = config.data, config.model.task
    if not load_objective(task).encoder_decoder:
        return
    if data.text is not None:
        raise InputError(
            f"data.text={data.text}: model.task={task} reads one column and learns to write another. Name both, as "
            f"data.columns={{prompt: {data.text}, completion: NAME}}."
        )
    if data.loss_on != "response":
        raise InputError(
            f"data.loss_on={data.loss_on}: with model.task={task} an encoder reads what is asked, and only answers are "
            "learned. Set it to response."
        )
    if data.template in OF_DECODERS:
        raise InputError(
            f"data.template={data.template}: its marks say who speaks, which a decoder has to be told. Of "
            f"model.task={task} the encoder reads what is asked: set it to null for the words as they stand, alpaca, "
            "or the path of a Jinja file."
        )


def require_template(given: str | None) -> None:
    """Raise InputError unless `data.template` is one of those here, or a file."""
    if given is not None and given not in TEMPLATES and not Path(given).is_file():
        raise InputError(registry.unknown("data.template", given, TEMPLATES) + " Or give the path of a Jinja file.")


def require_asked(config: Config, wording: Wording) -> None:
    """Refuse generated answers to test records that ask nothing.

    Raises:
        InputError: they are plain texts.
    """
    count = config.evaluation.generate.records
    if count and wording.form == "text":
        raise InputError(
            f"evaluation.generate.records={count}: the test records are plain texts, in which nothing is asked. Give "
            "conversations (columns such as prompt and completion), or set it to 0."
        )
