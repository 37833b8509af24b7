"""Conversations as a model's template writes them, as tokens, and which of these are learned.

A template is Jinja, as transformers renders it: the tokenizer's own, one of those here, or a file's. Which tokens are
the assistant's is found from the template alone, by writing a conversation up to each of its turns: what the model is
given when it has to answer, and what stands there once it has. Both must be beginnings of the whole in tokens. Where
tokens merge across the border of an answer, the characters that each token stands for decide, and a token with any
character of the answer is learned. What the template puts behind an answer, its end token first, is learned with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.data.conversations import Turn
from fedpeft.errors import InputError

if TYPE_CHECKING:
    from fedpeft.data.records import Records

ALPACA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}Below is an instruction that describes a "
    "task. Write a response that appropriately completes the request.{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}{{ '\\n\\n### Instruction:\\n' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '\\n\\n### Response:\\n' + message.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"
)
# Version 1.1, in the words that such models were tuned with; a system turn takes the place of the first sentences.
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}A chat between a curious user and an "
    "artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's "
    "questions.{% endif %}{{ ' ' }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ 'USER: ' + message.content + ' ' }}{% elif message.role == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# What an encoder reads, as it stands: it is trained without marks of who speaks.
READ = "{% for message in messages %}{{ message.content }}{{ '\n' if not loop.last }}{% endfor %}"
BUILT_IN = {"alpaca": ALPACA, "chatml": CHATML, "plain": PLAIN, "vicuna": VICUNA}
CHATML_MARKS = ("<|im_start|>", "<|im_end|>")


class NotWritten(Exception):
    """A template does not take a conversation; says why."""


@dataclass(frozen=True)
class Template:
    """A template and who writes what stands before and behind a text.

    Attributes:
        text: Jinja.
        name: as it is said to users.
        start: what the tokenizer itself puts before a text and the template does not, such as its mark of a beginning.
        encoder: what it writes is read by an encoder, so the tokenizer puts its marks around it, and no answer follows.
    """

    text: str
    name: str
    start: str = ""
    encoder: bool = False

    def write(self, turns: Sequence[Turn], tokenizer: Any, answering: bool = False) -> str:
        """The turns in the template's words; with `answering`, up to where the assistant begins.

        Raises:
            NotWritten: the template refuses the turns, or is no Jinja.
        """
        from jinja2 import TemplateError

        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=self.text, tokenize=False, add_generation_prompt=answering
            )
        # Templates add up and index what they expect, so they fail with errors of Python's too.
        except (TemplateError, TypeError, ValueError) as error:
            raise NotWritten(f"the template {self.name} refuses it: {error}") from error
        return self.start + str(text)

    def ask(self, turns: Sequence[Turn], tokenizer: Any) -> tuple[str, list[int]]:
        """What a model is given to answer the turns, in words and as tokens.

        Raises:
            NotWritten: as of `write`; and of several questions, where an encoder reads one.
        """
        if self.encoder and [role for role, _ in turns if role != "system"] != ["user"]:
            raise NotWritten(f"it has {len(turns)} turns, and an encoder reads one question")
        text = self.write(turns, tokenizer, answering=True)
        return text, list(tokenizer(text, add_special_tokens=self.encoder, verbose=False)["input_ids"])


def find_template(given: str | None, form: str, tokenizer: Any, encoder: bool = False) -> Template:
    """The template that `data.template` names; null is the tokenizer's own, else alpaca or plain by the records' form.

    Args:
        encoder: an encoder reads what it writes; null is then plain where the tokenizer has none.

    Raises:
        InputError: a file that cannot be read, or a template of marks that the tokenizer does not have.
    """
    if given is None and getattr(tokenizer, "chat_template", None):
        return Template(tokenizer.get_chat_template(), "of the tokenizer", encoder=encoder)
    if encoder:
        name = given or "plain"
        texts = {**BUILT_IN, "plain": READ}
        return Template(
            _with_end(texts[name], tokenizer) if name in texts else _read_template(name), name, encoder=True
        )
    name = given or ("alpaca" if form == "alpaca" else "plain")
    if name not in BUILT_IN:
        return Template(_read_template(name), name)
    if name == "chatml" and not set(CHATML_MARKS) <= set(tokenizer.get_vocab()):
        raise InputError(
            f"data.template=chatml: the tokenizer has no tokens {' and '.join(CHATML_MARKS)}, so the model would spell "
            "them letter by letter and never learn to stop. Take plain or alpaca, or a tokenizer that has them."
        )
    why = "" if given else ", as the tokenizer has none"
    return Template(
        _with_end(BUILT_IN[name], tokenizer), name + why, _start_mark(tokenizer) if name != "chatml" else ""
    )


def marks_of(tokenizer: Any) -> set[int]:
    """Tokens that are marks and no words: the special ones, and those that were added for a template."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def template_of(records: Records, tokenizer: Any, encoder: bool = False) -> Template:
    """The template that records are written by; of plain texts an empty one."""
    if records.wording.form == "text":
        return Template("", "")
    return find_template(records.wording.template, records.wording.form, tokenizer, encoder)


def describe_texts(records: Records, tokenizer: Any, encoder: bool = False) -> dict[str, str]:
    """What a language model's records are and how they became tokens, for the summary of a run."""
    wording = records.wording
    found = {"form": wording.form, "truncate": wording.truncate}
    if wording.form == "text":
        return found
    return {**found, "template": template_of(records, tokenizer, encoder).name, "loss_on": wording.loss_on}


def find_ends(template: Template, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's end token, and the marks that the template puts behind an answer."""
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if template.encoder:
        return sorted(ends)
    (written,) = write([[("user", "a"), ("assistant", "b")]], template, tokenizer, "response")
    if isinstance(written, Written):
        marks = marks_of(tokenizer)
        ends |= {token for token, chosen in zip(written.ids, written.learned, strict=True) if chosen and token in marks}
    return sorted(ends)


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.template={path}: not readable as a Jinja file: {error}") from error


def _with_end(text: str, tokenizer: Any) -> str:
    """The template without an end token that the tokenizer does not have."""
    return text if tokenizer.eos_token else text.replace("eos_token", "''")


def _start_mark(tokenizer: Any) -> str:
    """The mark of a beginning, where the tokenizer puts it before every text."""
    mark = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if mark is not None and tokenizer("a")["input_ids"][:1] == [mark] else ""


# Tokens and what of them is learned -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A conversation as tokens, and whether each is learned."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class _Border:
    """An answer: the text before it, and the text that ends with it."""

    before: str
    after: str


def write(
    conversations: Sequence[Sequence[Turn]],
    template: Template,
    tokenizer: Any,
    loss_on: str,
    since: Sequence[int] | None = None,
) -> list[Any]:
    """Of each conversation what the template makes of it (`Written`), or why it is not taken (`NotWritten`).

    Args:
        loss_on: "response", for what the assistant says, or "all".
        since: of each conversation the first turn of which something may be learned; None is the first.
    """
    results: list[Any] = []
    for turns, first in zip(conversations, since or [0] * len(conversations), strict=True):
        try:
            results.append(
                (template.write(turns, tokenizer), _find_borders(turns, template, tokenizer, loss_on, first))
            )
        except NotWritten as error:
            results.append(error)
    taken = [result for result in results if not isinstance(result, NotWritten)]
    whole = _tokenize_spans([text for text, _ in taken], tokenizer)
    parts = [part for _, borders in taken for border in borders for part in (border.before, border.after)]
    known = {text: ids for text, (ids, _) in zip(parts, _tokenize_spans(parts, tokenizer), strict=True)}
    written = iter(
        [
            _mark_learned(text, *tokens, borders, known, tokenizer)
            for (text, borders), tokens in zip(taken, whole, strict=True)
        ]
    )
    return [result if isinstance(result, NotWritten) else next(written) for result in results]


def _find_borders(turns: Sequence[Turn], template: Template, tokenizer: Any, loss_on: str, first: int) -> list[_Border]:
    """Of each turn of the assistant from the first one on that may be learned; none where all is learned."""
    if loss_on == "all":
        return []
    return [
        _Border(template.write(turns[:place], tokenizer, answering=True), template.write(turns[: place + 1], tokenizer))
        for place, (role, _) in enumerate(turns)
        if role == "assistant" and place >= first
    ]


def _tokenize_spans(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of texts, and the characters of each token; a tokenizer that does not say these has no list of them.

    The template has written the special tokens, so the tokenizer adds none.
    """
    if not texts:
        return []
    made = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    return list(zip(made["input_ids"], made.get("offset_mapping", [[]] * len(texts)), strict=True))


def _mark_learned(
    text: str,
    ids: list[int],
    spans: list[tuple[int, int]],
    borders: Sequence[_Border],
    known: dict[str, list[int]],
    tokenizer: Any,
) -> Written | NotWritten:
    learned = [not borders] * len(ids)
    for border in borders:
        start = _start_of(border.before, known[border.before], text, ids, spans)
        end = _end_of(border.after, known[border.after], text, ids, spans, tokenizer)
        if start is None or end is None or start >= end:
            return NotWritten(
                "the template writes its turns otherwise once later ones follow, so the answers cannot be found in the "
                "whole. Give a template that does not with data.template, or one answer a record"
            )
        learned[start:end] = [True] * (end - start)
    return Written(ids, learned)


def _start_of(
    before: str, before_ids: list[int], text: str, ids: list[int], spans: list[tuple[int, int]]
) -> int | None:
    """The first token of an answer; None where what stands before it is no beginning of the whole."""
    if ids[: len(before_ids)] == before_ids:
        return len(before_ids)
    if not text.startswith(before):
        return None
    return next((place for place, (_, end) in enumerate(spans) if end > len(before)), None)


def _end_of(
    after: str, after_ids: list[int], text: str, ids: list[int], spans: list[tuple[int, int]], tokenizer: Any
) -> int | None:
    """The token behind an answer and its end; None where it cannot be found in the whole.

    Some templates put one more mark behind the last turn, which is not there in the whole: nothing but such may differ.
    """
    pairs = enumerate(zip(ids, after_ids, strict=False))
    common = next((place for place, (token, other) in pairs if token != other), min(len(ids), len(after_ids)))
    if common == len(after_ids):
        return common
    if text.startswith(after) and spans:
        return next((place for place, (begin, _) in enumerate(spans) if begin >= len(after)), len(ids))
    rest = tokenizer.decode(after_ids[common:], skip_special_tokens=True)
    return None if rest.strip() else common
