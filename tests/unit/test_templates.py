"""What is learned of a conversation: what a labelling by characters says, on templates of five kinds."""

from __future__ import annotations

import pytest

from fedpeft.data import templates, wording
from fedpeft.data.templates import NotWritten, Template, Written
from fedpeft.errors import InputError
from support import chat

ONE = [("user", "What is the capital of Denmark?"), ("assistant", "The capital is Copenhagen.")]
SYSTEM = [("system", "Be brief."), *ONE]
THREE = [*ONE, ("user", "How many people live there?"), ("assistant", "About 650 thousand."), ("user", "Thank you.")]
LONG = [*ONE, ("user", "And ... ?"), ("assistant", "  Well,\nwell: 'åé😀'  \n"), *THREE[2:4]]


def written(turns, tokenizer, template=None, loss_on="response"):
    chosen = templates.find_template(template, "messages", tokenizer)
    (result,) = templates.write([turns], chosen, tokenizer, loss_on)
    return result


@pytest.mark.parametrize(
    "turns", [ONE, SYSTEM, THREE, [*ONE, *ONE], LONG], ids=["one", "system", "user last", "two", "odd"]
)
@pytest.mark.parametrize("kind", list(chat.JINJA))
def test_masks_are_those_of_a_labelling_by_characters(kind, turns):
    if kind in ("llama", "gemma"):  # these trim what is said
        turns = [(role, content.strip()) for role, content in turns]
    tokenizer = chat.tokenizer(kind)
    if kind == "gemma" and turns is not ONE and turns[0][0] == "system":
        refused = written(turns, tokenizer)
        assert isinstance(refused, NotWritten) and "System role not supported" in str(refused)
        return
    ids, learned = chat.by_characters(tokenizer, chat.PIECES[kind](turns))
    result = written(turns, tokenizer)
    assert result == Written(ids, learned) and any(learned) and not all(learned)
    everything = written(turns, tokenizer, loss_on="all")
    assert everything == Written(ids, [True] * len(ids))


@pytest.mark.parametrize("kind", list(chat.JINJA))
def test_the_end_of_an_answer_is_learned_and_marks_of_the_start_stand_once(kind):
    tokenizer = chat.tokenizer(kind, bos=True)  # the tokenizer would put another mark before the template's
    result = written(ONE, tokenizer)
    shown = tokenizer.convert_ids_to_tokens(result.ids)
    ends = {
        "chatml": "<|im_end|>",
        "llama": "<|eot_id|>",
        "gemma": "<end_of_turn>",
        "mistral": "</s>",
        "phi": "<|end|>",
    }
    said = [token for token, learned in zip(shown, result.learned, strict=True) if learned]
    assert said.count(ends[kind]) == 1 and shown.count(tokenizer.bos_token) == ("bos_token" in chat.JINJA[kind])
    assert (
        tokenizer.decode(
            [id for id, learned in zip(*vars(result).values(), strict=True) if learned], skip_special_tokens=True
        ).strip()
        == ONE[1][1]
    )


def test_a_token_across_the_border_of_an_answer_is_learned():
    # The prompt ends in a space, which the tokenizer joins to the word behind it.
    tokenizer = chat.tokenizer("")
    text = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    (result,) = templates.write([ONE], Template(text, "a file"), tokenizer, "response")
    pieces = [(f"user: {ONE[0][1]}\nassistant: ", False), (f"{ONE[1][1]}\n", True)]
    ids, learned = chat.by_characters(tokenizer, pieces)
    assert result == Written(ids, learned)
    first = tokenizer.convert_ids_to_tokens(ids)[learned.index(True)]
    assert first.startswith("Ġ") and len(first) > 1  # the space and a part of the answer


@pytest.mark.parametrize("bos", [False, True])
def test_own_templates_have_the_tokenizers_start_and_an_end(bos):
    tokenizer = chat.tokenizer("", bos=bos)
    start = "<s>" if bos else ""
    alpaca = (
        f"{start}Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nHow?\n\n### Response:\nSo.</s>"
    )
    turns = [("user", "How?"), ("assistant", "So.")]
    found = {name: written(turns, tokenizer, name) for name in ("alpaca", "plain")}
    assert (
        tokenizer.decode(found["alpaca"].ids) == alpaca
        and tokenizer.decode(found["plain"].ids) == f"{start}How?\nSo.</s>"
    )
    for result in found.values():
        learned = [id for id, chosen in zip(result.ids, result.learned, strict=True) if chosen]
        assert tokenizer.decode(learned) == "So.</s>"
    assert written([("system", "Sys"), *turns], tokenizer, "plain").ids == tokenizer("Sys\nHow?\nSo.</s>")["input_ids"]
    again = written([*turns, *turns], tokenizer, "alpaca")
    assert tokenizer.decode(again.ids) == alpaca + "\n\n### Instruction:\nHow?\n\n### Response:\nSo.</s>"


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


@pytest.mark.parametrize(
    "turns", [ONE, SYSTEM, THREE, [*ONE, *ONE], LONG], ids=["one", "system", "user last", "two", "odd"]
)
@pytest.mark.parametrize("bos", [False, True])
def test_vicunas_words_are_those_written_piece_by_piece(turns, bos):
    """USER: ... ASSISTANT: ...</s>USER: ..., of which each answer is learned, its space and its end token with it."""
    tokenizer = chat.tokenizer("", bos=bos)
    pieces = [("<s>" * bos, False), (f"{turns[0][1]} " if turns is SYSTEM else VICUNA, False)]
    for role, content in turns[turns is SYSTEM :]:
        pieces += (
            [(f"USER: {content} ", False)] if role == "user" else [("ASSISTANT:", False), (f" {content}</s>", True)]
        )
    ids, learned = chat.by_characters(tokenizer, pieces)
    assert written(turns, tokenizer, "vicuna") == Written(ids, learned)
    everything = written(turns, tokenizer, "vicuna", loss_on="all")
    assert everything == Written(ids, [True] * len(ids))
    template = templates.find_template("vicuna", "messages", tokenizer)
    assert template.write(ONE[:1], tokenizer, answering=True).endswith(f"questions. USER: {ONE[0][1]} ASSISTANT:")
    assert templates.find_ends(template, tokenizer) == [tokenizer.eos_token_id]


def test_which_template_is_taken_and_what_it_is_called(tmp_path):
    chosen = templates.find_template(None, "alpaca", chat.tokenizer("phi"))
    assert chosen.name == "of the tokenizer" and chosen.text == chat.JINJA["phi"]
    bare = chat.tokenizer("")
    assert templates.find_template(None, "alpaca", bare).name == "alpaca, as the tokenizer has none"
    assert templates.find_template(None, "messages", bare).name == "plain, as the tokenizer has none"
    assert templates.find_template("plain", "messages", chat.tokenizer("phi")).text == templates.PLAIN
    assert templates.find_template("chatml", "messages", chat.tokenizer("chatml")).text == templates.CHATML
    with pytest.raises(InputError, match=r"data\.template=chatml: the tokenizer has no tokens <\|im_start\|>"):
        templates.find_template("chatml", "messages", bare)
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content + '->' }}{{ messages[1].content if messages | length > 1 }}")
    result = written(ONE, bare, str(path))
    assert bare.decode([id for id, learned in zip(*vars(result).values(), strict=True) if learned]) == ONE[1][1]
    path.write_text("{% for %}")
    assert "refuses it" in str(written(ONE, bare, str(path)))


def test_a_name_that_is_no_template_is_refused_with_those_that_are(tmp_path):
    wording.require_template(None)
    assert tuple(templates.BUILT_IN) == wording.TEMPLATES
    wording.require_template("plain")
    with pytest.raises(InputError, match=r"data\.template: 'alpacca' is not known. Did you mean 'alpaca'.*Jinja file"):
        wording.require_template("alpacca")
    (tmp_path / "x.jinja").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="not readable as a Jinja file"):
        templates.find_template(str(tmp_path / "x.jinja"), "messages", chat.tokenizer(""))


def test_a_template_that_rewrites_earlier_turns_is_refused_and_not_guessed():
    # Templates that take the thoughts out of all turns but the last do so.
    text = (
        "{% for m in messages %}{{ m.role + ':' }}{% if loop.last and m.role == 'assistant' %}{{ '<think></think>' }}"
        "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = chat.tokenizer("")
    short, long = templates.write([ONE, [*ONE, *ONE]], Template(text, "a file"), tokenizer, "response")
    assert isinstance(short, Written) and isinstance(long, NotWritten) and "once later ones follow" in str(long)


def test_a_tokenizer_without_an_end_token_writes_none():
    from fedpeft.models.embedded import byte_tokenizer

    endless = byte_tokenizer()
    endless.eos_token = None
    result = written([("user", "a"), ("assistant", "b")], endless, "plain")
    assert endless.decode(result.ids) == "a\nb" and result.learned == [False, False, True]
