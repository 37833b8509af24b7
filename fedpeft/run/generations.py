"""Answers that a language model gives to test conversations, before and after training, beside those wanted.

Greedy: the most likely token each time, until a token that ends an answer. Prompts of a decoder are padded on the left,
so that every answer begins where its prompt ends; what an encoder reads is padded as in training, on the right.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedpeft import seeds
from fedpeft.config import Config
from fedpeft.data import templates
from fedpeft.data.conversations import parse_pair, parse_turns
from fedpeft.data.records import Records
from fedpeft.data.templates import NotWritten
from fedpeft.models.base import Base
from fedpeft.objectives.base import load_objective
from fedpeft.objectives.seq2seq import find_start
from fedpeft.run.world import World
from fedpeft.state import ServerState

log = logging.getLogger("fedpeft")
TOGETHER = 16  # prompts of one pass
SAMPLES = 10  # answers that a report shows


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: its tokens and words, and the answer that the record has."""

    ids: list[int]
    text: str
    wanted: str


def compare(world: World, server: ServerState) -> dict[str, Any] | None:
    """Answers of the model before and after training, JSON-ready; None where none were asked for, or there is no single
    model to ask.
    """
    section = world.config.evaluation.generate
    if not section.records or not len(world.test) or world.strategy.keeps:
        return None
    model = world.local.model
    encoder = model.base.objective.encoder_decoder
    asked = draw_prompts(world.config, world.test, model.base.processor, count_positions(model.base))
    if not asked:
        return None
    template = templates.template_of(world.test, model.base.processor, encoder)
    stop = templates.find_ends(template, model.base.processor)
    answers = {}
    for name, state in (("base", world.start.adapter), ("tuned", server.adapter)):
        model.write(state)
        answers[name] = generate_answers(model.base, [prompt.ids for prompt in asked], section.max_new_tokens, stop)
    wanted = [prompt.wanted for prompt in asked]
    samples = [
        {"prompt": prompt.text, "base": base, "tuned": tuned, "wanted": prompt.wanted}
        for prompt, base, tuned in zip(asked, answers["base"], answers["tuned"], strict=True)
    ]
    return {
        "records": len(asked),
        "max_new_tokens": section.max_new_tokens,
        **{name: score(said, wanted) for name, said in answers.items()},
        "samples": samples[:SAMPLES],
    }


def draw_prompts(config: Config, records: Records, tokenizer: Any, positions: int | None = None) -> list[Prompt]:
    """As many conversations as the config asks for, drawn from its seed, each up to its last answer.

    Those that the template does not take, or whose prompt is longer than a record may be, or fills the positions that
    the model has, are left out, and said.
    """
    encoder = load_objective(config.model.task).encoder_decoder
    template, section = templates.template_of(records, tokenizer, encoder), config.evaluation.generate
    rng = seeds.numpy_generator(config.run.seed, "generate")
    chosen = np.sort(rng.permutation(len(records))[: section.records])
    # What an encoder reads leaves the positions of its answer alone.
    most = None if positions is None else positions if encoder else positions - 1
    longest = config.model.max_length if most is None else min(config.model.max_length, most)
    found = []
    for index in chosen:
        text = records.inputs[index]
        turns = parse_pair(text)[0] if records.wording.form == "preference" else parse_turns(text)
        last = max(place for place, (role, _) in enumerate(turns) if role == "assistant")
        try:
            text, ids = template.ask(turns[:last], tokenizer)
        except NotWritten:
            continue
        if len(ids) <= longest:
            found.append(Prompt(ids, text, turns[last][1].strip()))
    if len(found) < len(chosen):
        log.warning(
            "evaluation.generate: %d of %d prompts have more than model.max_length=%d tokens%s, or are not taken by "
            "the template, and are left out",
            len(chosen) - len(found),
            len(chosen),
            config.model.max_length,
            f" or leave no room in the model's {positions} positions" if longest < config.model.max_length else "",
        )
    return found


@torch.no_grad()
def generate_answers(base: Base, prompts: Sequence[list[int]], most: int, stop: Sequence[int]) -> list[str]:
    """Greedy answers in words, to prompts of token ids; each is what it is alone.

    One that would need more positions than the model has is as long as these allow, and empty where there are none.

    Args:
        most: longest answer in tokens.
        stop: tokens that end an answer.
    """
    backbone: Any = base.backbone
    tokenizer = base.processor
    device = next(backbone.parameters()).device
    backbone.eval()
    answers: dict[int, str] = {}
    filler, start = tokenizer.pad_token_id or 0, None
    if base.objective.encoder_decoder:
        start = find_start(backbone)
    for rows, room in _batch_alike(
        [len(prompt) for prompt in prompts], most, count_positions(base), apart=start is not None
    ):
        if room < 1:
            answers |= dict.fromkeys(rows, "")
            continue
        ids, mask = pad([prompts[row] for row in rows], filler, left=start is None)
        settings = _generation_settings(room, stop, filler, start)
        with _without_habits(backbone):
            made = backbone.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        # A decoder goes on with its prompt; that of an encoder-decoder begins behind one mark.
        begin = ids.shape[1] if start is None else 1
        for row, said in zip(rows, made[:, begin:].tolist(), strict=True):
            end = next((place for place, token in enumerate(said) if token in stop), len(said))
            answers[row] = tokenizer.decode(said[:end], skip_special_tokens=True).strip()
    return [answers[row] for row in range(len(prompts))]


@contextmanager
def _without_habits(backbone: Any) -> Iterator[None]:
    """Leave out the settings that a checkpoint comes with: transformers takes them wherever its caller names none, and
    a penalty on repetition or a list of suppressed tokens would make an answer that is not the likeliest.
    """
    from transformers import GenerationConfig

    habits = backbone.generation_config
    backbone.generation_config = GenerationConfig()
    try:
        yield
    finally:
        backbone.generation_config = habits


def count_positions(base: Base) -> int | None:
    """Tokens of a prompt and its answer that the model can tell apart; None where it has no limit."""
    backbone: Any = base.backbone
    positions = getattr(backbone.config, "max_position_embeddings", None)
    return None if positions is None else int(positions)


def _batch_alike(
    lengths: Sequence[int], most: int, positions: int | None, apart: bool = False
) -> Iterator[tuple[list[int], int]]:
    """Numbers of prompts in batches of similar length, and the room for their answers in tokens.

    A prompt that leaves less room than an answer may need is alone: padded beside others it would have less, or they.

    Args:
        apart: a prompt takes none of the positions of its answer.
    """
    # By length: beside a long prompt short ones are mostly padding, and the longest, which lack room, are last.
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    if apart:
        most, positions = most if positions is None else min(most, positions), None
    roomy = [row for row in order if positions is None or lengths[row] + most <= positions]
    for start in range(0, len(roomy), TOGETHER):
        yield roomy[start : start + TOGETHER], most
    for row in order[len(roomy) :]:
        yield [row], (positions or 0) - lengths[row]


def pad(rows: Sequence[list[int]], filler: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [N, T] of prompts, the padding before them, where an answer follows them, or else behind."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), filler), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        there = slice(width - len(row), width) if left else slice(len(row))
        ids[place, there], mask[place, there] = torch.tensor(row), 1
    return ids, mask


def _generation_settings(room: int, stop: Sequence[int], filler: int, start: int | None) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=room,
        eos_token_id=list(stop) or None,
        pad_token_id=filler,
        decoder_start_token_id=start,
    )


def score(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Share of answers that are the wanted one to the letter, and ROUGE-L: the mean F1 of the longest common
    subsequence of words (Lin 2004), a word being a run of letters and digits of any script, in lower case.
    """
    from torchmetrics.functional.text.rouge import rouge_score

    rouge = rouge_score(
        list(answers),
        list(wanted),
        rouge_keys="rougeL",
        normalizer=str.lower,
        tokenizer=lambda text: re.findall(r"\w+", text),
    )
    exact = sum(answer == right for answer, right in zip(answers, wanted, strict=True)) / len(wanted)
    return {"exact_match": exact, "rouge_l": float(rouge["rougeL_fmeasure"])}
