"""A small tokenizer with merges, templates of five kinds, and the same words written piece by piece, by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from fedpeft.data.conversations import Turn

CORPUS = (
    "What is the capital of Denmark? The capital is Copenhagen. How many people live there? About 650 thousand, with "
    "the islands. Write a response that completes the request. User: Assistant: Be brief. I am well, thank you.\n\n"
    "### Instruction:\n### Response:\n assistant\n user\n model\n system\n"
)
MARKS = {  # start, end and what else is one token
    "chatml": ("<s>", "<|im_end|>", ["<|im_start|>"]),
    "llama": ("<|begin|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
    "phi": ("<s>", "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
}
JINJA = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}
Pieces = list[tuple[str, bool]]  # words, and whether the assistant has to say them


def _framed(turns: list[Turn], head: Callable[[str], str], tail: str) -> Pieces:
    pieces: Pieces = []
    for role, content in turns:
        answers = role == "assistant"
        pieces += [(head(role), False), (content, answers), (tail, answers)]
    return pieces


def _chatml(turns: list[Turn]) -> Pieces:
    return _framed(turns, lambda role: f"<|im_start|>{role}\n", "<|im_end|>\n")


def _llama(turns: list[Turn]) -> Pieces:
    return [
        ("<|begin|>", False),
        *_framed(turns, lambda r: f"<|start_header_id|>{r}<|end_header_id|>\n\n", "<|eot_id|>"),
    ]


def _gemma(turns: list[Turn]) -> Pieces:
    names = {"assistant": "model", "user": "user"}
    return [("<bos>", False), *_framed(turns, lambda role: f"<start_of_turn>{names[role]}\n", "<end_of_turn>\n")]


def _mistral(turns: list[Turn]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for role, content in turns:
        if role == "assistant":
            pieces.append((f" {content}</s>", True))
        else:
            pieces.append((f"[INST] {content} [/INST]" if role == "user" else f"{content}\n\n", False))
    return pieces


def _phi(turns: list[Turn]) -> Pieces:
    last = turns[-1][0] == "assistant"
    return [*_framed(turns, lambda role: f"<|{role}|>\n", "<|end|>\n"), ("<|endoftext|>", last)]


PIECES: dict[str, Callable[[list[Turn]], Pieces]] = {
    "chatml": _chatml,
    "llama": _llama,
    "gemma": _gemma,
    "mistral": _mistral,
    "phi": _phi,
}


def by_characters(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """Ids, and whether each token has a character that the assistant has to say."""
    text = "".join(words for words, _ in pieces)
    said = [answers for words, answers in pieces for _ in words]
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [any(said[start:end]) for start, end in encoding.offsets]


@cache
def tokenizer(kind: str, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer with merges and the special tokens of a kind of template, and that template.

    Args:
        kind: of `JINJA`, or "" for one without a template.
        bos: it puts its mark of a beginning before a text by itself.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    return _with_marks(made, kind, bos)


def fixed_tokenizer(kind: str, merges: list[str]) -> Any:
    """As `tokenizer`, with these merges and the numbers that follow from them: whatever a trainer would make."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in pairs)]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(dict.fromkeys(words))}, pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _with_marks(made, kind, bos=False)


def _with_marks(made: Any, kind: str, bos: bool) -> Any:
    from tokenizers import AddedToken, decoders
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    start, end, more = MARKS[kind] if kind else ("<s>", "</s>", [])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True) for word in ("<pad>", start, end, *more)])
    if bos:
        made.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, made.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token=start,
        eos_token=end,
        chat_template=JINJA[kind] if kind else None,
        model_input_names=["input_ids", "attention_mask"],
    )
