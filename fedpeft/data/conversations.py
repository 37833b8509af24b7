"""Conversations in a table: the form that they have, found from the columns, and their turns.

    form         columns                                                  turns
    messages     messages: a list of {role, content}                      as they are
    sharegpt     conversations: a list of {from, value}                   human is the user, gpt the assistant
    alpaca       instruction, output (or response); input may be missing  instruction and input are asked, output said
    completion   prompt, completion: strings, or lists of messages        prompt is asked, completion said
    qa           question, answer                                         question is asked, answer said
    preference   chosen, rejected: strings, or lists of messages; prompt  two conversations, which share what is asked
                 may be missing where these are lists                     and end in the better and the worse answer

>>> form, columns = find_form(["question", "answer"], {}, "faq.csv")
>>> form.name, form.read({"question": "2 + 2?", "answer": "4"})
('qa', [('user', '2 + 2?'), ('assistant', '4')])
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedpeft import registry
from fedpeft.data.columns import ASKED, PARTNERS, is_missing
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective

Turn = tuple[str, str]  # role (system, user or assistant) and content
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant"}
SYSTEMS = ("system", "system_prompt")
GIVEN = "given"  # third of a turn of the assistant that stands in a prompt
HALVES = {*ASKED, *PARTNERS, *SYSTEMS, "problem"}  # columns that are a part of a conversation


class Malformed(Exception):
    """A record is no conversation; says why."""


@dataclass(frozen=True)
class Form:
    """A way to write a conversation into columns.

    Attributes:
        needed, optional: what a record has, and the usual names of its columns, in lower case.
        read: turns of a record, by what it has, of a preference those of both conversations; raises Malformed.
    """

    name: str
    needed: Mapping[str, tuple[str, ...]]
    read: Callable[[Mapping[str, Any]], Sequence[Any]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"system": ("system",)})

    def find(self, columns: Mapping[str, str]) -> dict[str, str]:
        """What the form has -> column, of columns by their lower-case names; empty where one is lacking."""
        every = {**self.needed, **self.optional}
        held = {
            key: columns[name]
            for key, names in every.items()
            if (name := next(filter(columns.__contains__, names), ""))
        }
        return held if self.needed.keys() <= held.keys() else {}


# Reading one record ---------------------------------------------------------------------------------------------------


def _read_messages(row: Mapping[str, Any]) -> list[Turn]:
    return _check_turns(_read_system(row) + _read_turns(row["messages"], "messages", "role", "content", ROLES))


def _read_sharegpt(row: Mapping[str, Any]) -> list[Turn]:
    turns = _read_turns(row["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    return _check_turns(_read_system(row) + turns)


def _read_alpaca(row: Mapping[str, Any]) -> list[Turn]:
    asked = _require_string(row["instruction"], "instruction")
    if not is_missing(row.get("input")):
        asked += "\n\n" + _require_string(row["input"], "input")
    return _check_turns([*_read_system(row), ("user", asked), ("assistant", _require_string(row["output"], "output"))])


def _read_completion(row: Mapping[str, Any]) -> list[Any]:
    """Answers in the prompt are given, as TRL has it: they are marked, and not learned."""
    asked = _read_system(row) + _read_said(row, "prompt", "user")
    turns = _check_turns(asked + _read_said(row, "completion", "assistant"))
    given = [(*turn, GIVEN) if turn[0] == "assistant" else turn for turn in turns[: len(asked)]]
    return [*given, *turns[len(asked) :]]


def _read_qa(row: Mapping[str, Any]) -> list[Turn]:
    return _check_turns(
        [
            *_read_system(row),
            ("user", _require_string(row["question"], "question")),
            ("assistant", _require_string(row["answer"], "answer")),
        ]
    )


def _read_preference(row: Mapping[str, Any]) -> list[list[Turn]]:
    asked = [] if is_missing(row.get("prompt")) else _read_said(row, "prompt", "user")
    both = []
    for key in ("chosen", "rejected"):
        if not asked and isinstance(row[key], str):
            raise Malformed(f"its {key} is a string, and nothing says what it answers; give a prompt, or messages")
        said = _read_said(row, key, "assistant")
        # Some data sets repeat the prompt in both.
        turns = _check_turns(_read_system(row) + (said if said[: len(asked)] == asked else asked + said))
        if turns[-1][0] != "assistant":
            raise Malformed(f"its {key} ends with the user")
        both.append(turns)
    shared = count_shared(*both)
    if both[0] == both[1]:
        raise Malformed("its chosen and rejected are the same")
    if shared == min(map(len, both)):
        raise Malformed("one of its chosen and rejected is only the beginning of the other")
    if "user" not in [role for role, _ in both[0][:shared]]:
        raise Malformed("its chosen and rejected answer different questions")
    return both


def count_shared(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> int:
    """How many turns two conversations begin with both."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))


def _read_said(row: Mapping[str, Any], key: str, role: str) -> list[Turn]:
    """What is said in a column: a string, which is one turn of this role, or a list of messages."""
    if isinstance(row[key], str) or is_missing(row[key]):
        return [(role, _require_string(row[key], key))]
    return _read_turns(row[key], key, "role", "content", ROLES)


def _read_system(row: Mapping[str, Any]) -> list[Turn]:
    """The system turn that stands in a column of its own, if any."""
    return [] if is_missing(row.get("system")) else [("system", _require_string(row["system"], "system"))]


def _require_string(value: Any, key: str) -> str:
    if isinstance(value, str) and not is_missing(value):
        _require_unicode(value, key)
        return value
    raise Malformed(
        f"its {key} is empty" if is_missing(value) else f"its {key} is no string, but {_shorten_text(value)}"
    )


def _require_unicode(value: str, what: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"its {what} has half of a character (\\u{ord(value[error.start]):04x})") from error


def _read_turns(value: Any, key: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> list[Turn]:
    """Turns of a list of objects, each with a role and a content."""
    if is_missing(value) or not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise Malformed(f"its {key} is no list, but {_shorten_text(value)}")
    turns = []
    for place, item in enumerate(value, 1):
        if not isinstance(item, Mapping) or role_key not in item or content_key not in item:
            raise Malformed(
                f"turn {place} is {_shorten_text(item)}; expected an object with {role_key} and {content_key}"
            )
        role = item[role_key]
        if not isinstance(role, str) or role not in roles:
            raise Malformed(f"turn {place} has the {role_key} {_shorten_text(role)}; allowed: {', '.join(roles)}")
        turns.append((roles[role], _require_string(item[content_key], f"{content_key} of turn {place}")))
    return turns


def _check_turns(turns: list[Turn]) -> list[Turn]:
    """The turns, where user and assistant take turns, after at most one of the system."""
    if not turns:
        raise Malformed("it has no turn")
    said = [role for role, _ in turns[turns[0][0] == "system" :]]
    first = len(turns) - len(said) + 1  # number of the first turn that is not the system's
    if "system" in said:
        raise Malformed(f"turn {first + said.index('system')} is of the system, which may speak first only")
    if said[:1] == ["assistant"]:
        raise Malformed("it begins with the assistant, whom nobody has asked")
    twice = next((place for place in range(1, len(said)) if said[place] == said[place - 1]), None)
    if twice is not None:
        raise Malformed(f"turns {first + twice - 1} and {first + twice} are both of the {said[twice]}")
    if "assistant" not in said:
        raise Malformed("it has no turn of the assistant")
    return turns


def _shorten_text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# The form of a table --------------------------------------------------------------------------------------------------

FORMS = (
    Form(
        "preference",
        {"chosen": ("chosen",), "rejected": ("rejected",)},
        _read_preference,
        {"prompt": ("prompt", "question"), "system": ("system",)},
    ),
    Form("messages", {"messages": ("messages",)}, _read_messages),
    Form("sharegpt", {"conversations": ("conversations", "conversation")}, _read_sharegpt),
    Form(
        "alpaca",
        {"instruction": ("instruction",), "output": ("output", "response")},
        _read_alpaca,
        {"input": ("input",), "system": ("system",)},
    ),
    Form("completion", {"prompt": ("prompt",), "completion": ("completion",)}, _read_completion),
    Form("qa", {"question": ("question",), "answer": ("answer",)}, _read_qa),
)
# Preferences stay the first: `unanswered` leaves them out by their place.
PAIRS = FORMS[:1]
WHOLE = ("messages", "sharegpt")  # forms whose one column has all that was said


def find_form(
    names: Sequence[str],
    given: Mapping[str, Any],
    where: str,
    known: Collection[str | None] = (),
    forms: Sequence[Form] = FORMS,
) -> tuple[Form, dict[str, str]] | None:
    """The form of a table's conversations, and what it has -> column; None where the columns are no conversation's.

    Args:
        names: the table's columns.
        given: `data.columns`; empty is to find them by their names.
        where: the table, for messages.
        known: columns that hold something else for certain.
        forms: those that are looked for; `PAIRS` where no other is of use.

    Raises:
        InputError: `given` is no form or names no column; several forms fit, or a form leaves out a column that may be
            a part of the conversation.
    """
    if given:
        return _named_form(names, given, where)
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        if name not in known:
            by_name[name.strip().lower()].append(name)
    columns = {lower: same[0] for lower, same in by_name.items()}
    fits = [(form, held) for form in forms if (held := form.find(columns))]
    if not fits:
        if forms is not PAIRS:
            _require_no_halves(columns, where)
        return None
    form, held = fits[0]
    others = [
        *(", ".join(other.values()) for _, other in fits),
        *(columns[name] for name in ("text",) if name in columns and forms is not PAIRS),
    ]
    twice = [same for same in by_name.values() if len(same) > 1 and set(same) & set(held.values())]
    if len(others) > 1 or twice:
        which = " or in ".join(others if len(others) > 1 else twice[0])
        raise InputError(f"{where}: what is to be learned could be in {which}. {_how_to_name(held, columns)}")
    left = [columns[lower] for lower in sorted(HALVES & columns.keys()) if columns[lower] not in held.values()]
    if left and form.name not in WHOLE:
        way = held if "input" not in form.optional.keys() - held.keys() else {**held, "input": left[0]}
        raise InputError(
            f"{where}: beside {', '.join(held.values())} there is {', '.join(left)}, which may be a part of the same "
            f"conversation. {_how_to_name(way, columns)}"
        )
    return form, held


def _require_no_halves(columns: Mapping[str, str], where: str) -> None:
    """Refuse a question and an answer under names that are of no form, where no column has the whole text."""
    asked = [columns[name] for name in sorted(ASKED & columns.keys())]
    said = [columns[name] for name in sorted(PARTNERS & columns.keys())]
    if asked and said and "text" not in columns:
        columns_key = as_key({"prompt": asked[0], "completion": said[0]})
        raise InputError(
            f"{where}: {', '.join(asked + said)} seem to be parts of a conversation, in no form that is known by these "
            f"names. Say what is what, as {columns_key}, or name the column of whole texts with data.text."
        )


def _how_to_name(held: Mapping[str, str], columns: Mapping[str, str]) -> str:
    text = f", or data.text={columns['text']} for that text alone" if "text" in columns else ""
    return f"Say it: {as_key(held)}{text} (fedpeft show data has the names of all forms)."


def as_key(columns: Mapping[str, str]) -> str:
    """These columns as the `data.columns` that names them."""
    return f"data.columns={{{', '.join(f'{key}: {name}' for key, name in columns.items())}}}"


def _named_form(names: Sequence[str], given: Mapping[str, Any], where: str) -> tuple[Form, dict[str, str]]:
    """The form that `data.columns` names."""
    fits = [form for form in FORMS if form.needed.keys() <= given.keys() <= {*form.needed, *form.optional}]
    if not fits:
        raise InputError(
            f"data.columns has the keys {', '.join(given)}; allowed are those of one form: "
            f"{'; '.join(', '.join(form.needed) for form in FORMS)}. Beside them "
            "may stand system, input (of instruction, output) and prompt (of chosen, rejected)."
        )
    for key, name in given.items():
        if name not in names:
            raise InputError(registry.unknown(f"data.columns.{key}", name, names) + f" (columns of {where})")
    return fits[0], dict(given)


def require_form(form: Form | None, task: str, where: str) -> None:
    """Refuse a form that is of another task.

    Raises:
        InputError: preferences for a language model, or something else for the objective that learns of them; plain
            texts where one is read and another written.
    """
    objective = load_objective(task)
    has, needs = form is not None and form.name == "preference", objective.labelled == "pairs"
    if has == needs and (form is not None or not objective.encoder_decoder):
        return
    if has == needs:
        raise InputError(
            f"{where}: model.task={task} reads one column and learns to write another. Name both with "
            "data.columns={prompt: NAME, completion: NAME}."
        )
    if has:
        raise InputError(
            f"{where}: chosen and rejected are preferences, of which model.task={task} does not learn. Set "
            "model.task=preference; or train on what was chosen, as data.columns={prompt: prompt, completion: chosen}."
        )
    raise InputError(
        f"{where}: model.task={task} learns of pairs of answers, and there are no columns chosen and rejected. Name "
        "them with data.columns={chosen: NAME, rejected: NAME}, and prompt: NAME where these are strings."
    )


def read_rows(
    columns: Mapping[str, Sequence[Any]], form: Form, held: Mapping[str, str], where: str, skip_bad: bool
) -> tuple[list[str], list[int], list[str]]:
    """Each record's turns as text (`dump`), the numbers of the records that have some, and what is bad of the others.

    Args:
        columns: of the table.
        held: what the form has -> column, of `find_form`.
        skip_bad: leave out what is no conversation.

    Raises:
        InputError: a record is no conversation; names the record.
    """
    texts, kept, bad = [], [], []
    for number in range(len(columns[next(iter(held.values()))])):
        try:
            turns = form.read({key: columns[name][number] for key, name in held.items()})
        except Malformed as error:
            if not skip_bad:
                raise InputError(
                    f"{where}: record {number + 1} is no conversation of the columns {', '.join(held.values())}: "
                    f"{error}. Mend or remove it, or set data.skip_bad=true, which counts such records and leaves "
                    "them out."
                ) from error
            bad.append(f"record {number + 1} ({error})")
        else:
            texts.append(dump_turns(turns))
            kept.append(number)
    if not texts:
        raise InputError(f"{where}: none of {len(bad)} records is a conversation; the first: {bad[0]}.")
    return texts, kept, bad


def dump_turns(turns: Sequence[Any]) -> str:
    """Turns, or both conversations of a preference, as one text."""
    # Escapes would take two to three times the bytes of most scripts.
    return json.dumps(turns, ensure_ascii=False)


def parse_turns(text: str) -> list[Turn]:
    """The turns of a text that `dump_turns` has made."""
    return [(role, content) for role, content, *_ in json.loads(text)]


def count_given(text: str) -> int:
    """How many turns of a text that `dump_turns` has made come before the first of which something may be learned."""
    return max((place for place, turn in enumerate(json.loads(text), 1) if turn[2:] == [GIVEN]), default=0)


def parse_pair(text: str) -> tuple[list[Turn], list[Turn]]:
    """The turns of the chosen and of the rejected conversation of a text that `dump_turns` has made."""
    chosen, rejected = json.loads(text)
    return [(role, content) for role, content in chosen], [(role, content) for role, content in rejected]
