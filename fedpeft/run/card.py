"""The model card of an exported folder, README.md as the Hugging Face hub reads it.

It says how the model came about, and nothing that is a site's own: no path of this machine, no client's name or number
of records, and of the data only their form, and their name where that is one of the hub.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft import __version__
from fedpeft.adapters import folder
from fedpeft.adapters.placed_folder import write_loading_lines
from fedpeft.config import Config
from fedpeft.data import prepare
from fedpeft.data.readers import ENDINGS
from fedpeft.data.templates import BUILT_IN
from fedpeft.files import read_object
from fedpeft.foreign import shown
from fedpeft.objectives.base import Objective, load_objective
from fedpeft.record import measured
from fedpeft.record.findings import SERVER
from fedpeft.record.lead import SEEDED
from fedpeft.record.metrics import read
from fedpeft.record.words import number, percent

NAME = "README.md"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
}
FORMS = {
    "text": "plain texts",
    "messages": "conversations (messages)",
    "sharegpt": "conversations (ShareGPT)",
    "alpaca": "instructions and answers (Alpaca)",
    "completion": "prompts and completions",
    "qa": "questions and answers",
    "preference": "preferences (chosen and rejected answers)",
}
UNLEARNED = {  # kind of what was asked -> what may be told of it
    "client": "all records of one client",
    "task": "one task of the sequence",
    "records": "some of the training records",
}


@dataclass(frozen=True)
class Exported:
    """What a card is of.

    Attributes:
        run: the run's folder.
        base: what others call the base model.
        round: after which the state is.
        merged: a whole model, else an adapter.
        pooled: the head is a mean-pooled one of fedpeft's.
        names: of the head's outputs; ["all"] without a head.
        processor: there is a tokenizer, or processor of images, in the folder.
        license: of the result, where the user has said it.
        rank: the first so many ranks alone.
    """

    run: Path
    config: Config
    base: str
    round: int
    merged: bool
    pooled: bool
    names: list[str]
    processor: bool
    license: str | None = None
    rank: int | None = None

    @property
    def objective(self) -> Objective:
        """What the model was trained to do."""
        return load_objective(self.config.model.task)

    @property
    def own_lines(self) -> list[str] | None:
        """What puts an adapter over its base `model` that stock peft has no tuner for; None of all others."""
        headed = self.objective.headed and not self.pooled and self.config.adapter.train_head
        return None if self.merged else write_loading_lines(self.config.adapter, headed)


def write(exported: Exported) -> str:
    """The card of an exported folder.

    Raises:
        InputError: the run's summary cannot be read.
    """
    summary = read_object(exported.run / "summary.json")
    parts = [
        f"---\n{front_matter(exported)}\n---\n",
        f"# {'A model' if exported.merged else 'An adapter'} fine-tuned from {_escape_markdown(exported.base)}\n",
        f"Fine-tuned by federated learning with fedpeft {__version__}, {_say_where(exported.config)}.\n",
        _markdown_table([["", ""], *_facts_table(exported, summary)]),
        "## Privacy\n",
        f"{privacy(exported.config, summary)}\n",
        "## Metrics\n",
        _metrics_section(exported, summary),
        "## How to load it\n",
        f"```python\n{usage_snippet(exported)}\n```\n",
    ]
    kept = exported.config.model.quantization
    if kept is not None and not exported.merged:
        parts.append(
            f"It was trained over this base as bitsandbytes keeps it in {kept}: load it so for the same answers, and "
            "put the adapter on a base that has not answered before. On some CPUs bitsandbytes repacks the weights at "
            "a base's first answer, and an adapter put on it later computes with wrong ones.\n"
        )
    if exported.objective.headed:
        # As JSON no name, which is whatever the data had, can end its line and so the block.
        names = json.dumps(dict(enumerate(exported.names)), indent=2, ensure_ascii=False)
        parts.append(f"## Outputs of the head\n\n```json\n{names}\n```\n")
    return "\n".join(parts)


def shareable_name(name: str, embedded: bool = False) -> str:
    """What others may be told of a model's name: a hub id, or a name of fedpeft's, as it is; of a path its last part.

    >>> shareable_name("HuggingFaceTB/SmolLM2-135M"), shareable_name("/home/ada/models/letters")
    ('HuggingFaceTB/SmolLM2-135M', 'letters')
    """
    # A folder models/letters reads like a hub id too, and its path is nobody's business.
    if embedded or (HUB_ID.fullmatch(name) and not Path(name).exists()):
        return name
    return Path(name).name or Path(name).resolve().name


def front_matter(exported: Exported) -> str:
    """The metadata of the card as YAML, in huggingface_hub's words."""
    from huggingface_hub import ModelCardData

    config = exported.config
    tags = ["fedpeft", "federated-learning", *([] if exported.merged else [config.adapter.name])]
    if config.privacy.unit != "none":
        tags.append("differential-privacy")
    datasets = [config.data.source] if _is_on_hub(config) else None
    return ModelCardData(
        base_model=exported.base if HUB_ID.fullmatch(exported.base) and not Path(exported.base).exists() else None,
        library_name=_name_library(exported),
        # A pipeline would draw a random head in the place of a pooled one.
        pipeline_tag=None if exported.pooled else PIPELINES.get(exported.objective.auto_class),
        license=exported.license,
        datasets=datasets,
        tags=tags,
    ).to_yaml()


def _name_library(exported: Exported) -> str:
    """What loads the folder, as the hub calls it."""
    if exported.merged:
        return "sentence-transformers" if exported.pooled else "transformers"
    return "peft" if exported.own_lines is None else "transformers"


def _is_on_hub(config: Config) -> bool:
    """Whether the records are a data set of the hub, as far as its name says; those of sites are their own."""
    source = config.data.source
    # Prepared sets have names that read like hub ids, as vader/movie.
    known = prepare.canonical(source.partition("/")[0]) in prepare.RECIPES
    local = Path(source).exists() or source.lower().endswith(tuple(ENDINGS))
    return bool(config.run.engine != "sites" and HUB_ID.fullmatch(source) and not known and not local)


def _escape_markdown(text: str) -> str:
    """A name as Markdown that shows it as it is, in one line."""
    return re.sub(r"([\\`*<>\[\]|&])", r"\\\1", shown(text))


def _say_where(config: Config) -> str:
    sites = "over sites that kept their records"
    return sites if config.run.engine == "sites" else "simulated on one machine"


def _facts_table(exported: Exported, summary: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: what was trained, on what, and how."""
    config = exported.config
    asked, rounds, client = config.run.clients_per_round, summary.get("rounds"), config.client
    state = f"; this is the state after round {exported.round}" if exported.round != rounds else ""
    work = f"{client.local_steps} steps" if client.local_steps else f"{client.local_epochs} epochs"
    rows = [
        [
            "base model",
            _escape_markdown(exported.base)
            + (f", kept in {config.model.quantization}" if config.model.quantization else ""),
        ],
        ["task", config.model.task],
        ["data", _describe_data(exported, summary)],
        ["clients", f"{summary.get('clients')}{f', {asked} of them a round' if asked else ''}"],
        ["rounds", f"{rounds}{state}"],
        ["strategy", ", inside ".join(config.strategy.names)],
        ["client", f"{work} a round, batches of {client.batch_size}, {client.optimizer}, rate {client.lr:g}"],
        ["adapter", _describe_adapter(config, exported.rank)],
    ]
    if summary.get("unlearning"):
        result = summary["unlearning"]
        rows.append(["unlearned", f"{UNLEARNED[result['asked']['kind']]}, by {result['method']}"])
    if exported.config.continual.body:
        rows.append(["tasks", f"{config.continual.tasks}, one after another, by {config.continual.body}"])
    return rows


def _describe_adapter(config: Config, rank: int | None) -> str:
    if config.adapter.name == "peft":
        return f"peft's {config.adapter.options['type']}"
    part = "" if rank is None else f"the first {rank} of "
    return f"{config.adapter.name}, {part}rank {config.adapter.r}, alpha {config.adapter.alpha:g}"


def _describe_data(exported: Exported, summary: dict[str, Any]) -> str:
    """The form of the records; their name only where it is the hub's."""
    where = f", {exported.config.data.source}" if _is_on_hub(exported.config) else ""
    texts = summary.get("texts")
    if not isinstance(texts, dict):
        return f"{exported.objective.records}s{where}"
    if texts.get("form") == "text":
        return f"{FORMS['text']}{where}"
    name = str(texts.get("template", ""))
    template = name if name.partition(",")[0] in (*BUILT_IN, "of the tokenizer") else "a Jinja file's"
    learned = "what the assistant says" if texts.get("loss_on") == "response" else "everything"
    return f"{FORMS.get(str(texts.get('form')), 'conversations')}{where}; template {template}; {learned} is learned"


def privacy(config: Config, summary: dict[str, Any]) -> str:
    """One paragraph: the guarantee with its numbers, or that there is none."""
    section = config.privacy
    if section.unit == "none":
        return "None: the model was trained without differential privacy, and may repeat what it was trained on."
    spent = summary.get("epsilon_max")
    epsilon = "epsilon in the clients' own ledgers" if spent is None else f"epsilon {number(spent)}"
    one = "record of a client" if section.unit == "sample" else "client with all its records"
    seeded = f" The noise was {SEEDED}." if section.randomness == "seeded" else ""
    return (
        f"Differential privacy: {epsilon} at delta {section.delta:g}, for one {one} (unit {section.unit}), by the "
        f"{section.accountant} accountant over the whole run.{seeded}"
    )


def _metrics_section(exported: Exported, summary: dict[str, Any]) -> str:
    if exported.config.continual.body:
        final = (summary.get("final") or {}).get("accuracy")
        head = exported.config.continual.head
        return f"Accuracy {percent(final)} over the classes of all tasks, by the head {head} of the run.\n"
    where = "" if summary.get("evaluated_on") == SERVER else "client_"
    rows = measured.table(read(exported.run / "metrics.jsonl"), where, exported.round)
    shown = [
        [row["words"], *(percent(row[key]) if row["share"] else number(row[key]) for key in ("frozen", "final"))]
        for row in rows.values()
        if row["final"] is not None
    ]
    if not shown:
        return "Not evaluated.\n"
    where = f"a test set of {summary.get('test_records')} records" if not where else "clients' held-out records"
    return f"On {where}:\n\n" + _markdown_table([["measure", "before training", "after"], *shown])


def _markdown_table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


# How to load it -------------------------------------------------------------------------------------------------------


def usage_snippet(exported: Exported) -> str:
    """Plain transformers and peft that load the folder and use it, `here` being the folder or its repo."""
    if exported.pooled:
        return _pooled_usage(exported)
    kind = exported.objective.auto_class
    inputs, use = _usage_lines(exported)
    imports = [kind, *inputs]
    own = exported.own_lines
    where = "this folder, or the name of its repo" if own is None else "this folder"
    return "\n".join(
        [
            *_loader_imports(exported),
            f"from transformers import {', '.join(sorted(imports))}",
            "",
            f'here = "."  # {where}',
            f"model = {_loading_expression(exported, kind)}.eval()",
            *(own or []),
            *use,
        ]
    )


def _loader_imports(exported: Exported) -> list[str]:
    """What an adapter is loaded with."""
    if exported.own_lines is not None:
        return ["import functools", "", "import torch", "from safetensors.torch import load_file"]
    return [] if exported.merged else ["from peft import PeftModel"]


def _loading_expression(exported: Exported, kind: str) -> str:
    """An expression that loads the whole model as this class of transformers'."""
    code = ", trust_remote_code=True" if exported.config.model.trust_remote_code else ""
    if exported.merged:
        return f"{kind}.from_pretrained(here{code})"
    outputs = f", num_labels={len(exported.names)}" if exported.objective.headed and not exported.pooled else ""
    if exported.own_lines is not None:
        return f"{kind}.from_pretrained({_quote_base(exported)}{outputs}{code})"
    return f"PeftModel.from_pretrained({kind}.from_pretrained({_quote_base(exported)}{outputs}{code}), here)"


def _quote_base(exported: Exported) -> str:
    """The base's name as a text of Python, in double quotes."""
    return json.dumps(exported.base, ensure_ascii=False)


def _tokenizer_expression(exported: Exported) -> str:
    return f"AutoTokenizer.from_pretrained({'here' if exported.processor else _quote_base(exported)})"


def _usage_lines(exported: Exported) -> tuple[list[str], list[str]]:
    """Names of transformers to import, and lines that ask the model."""
    if exported.objective.records == "image" and not exported.processor:
        return [], ["scores = model(pixel_values=pixels).logits  # pixels: [N, channels, height, width]"]
    if exported.objective.records == "image":
        return ["AutoImageProcessor"], [
            "processor = AutoImageProcessor.from_pretrained(here)",
            'scores = model(**processor(images, return_tensors="pt")).logits  # images: a list of PIL pictures',
        ]
    tokenizer = f"tokenizer = {_tokenizer_expression(exported)}"
    settings = ".from_pretrained(here, max_new_tokens=64)" if exported.processor else "(max_new_tokens=64)"
    if exported.objective.encoder_decoder:
        written = 'asked[0]["content"]'
        if exported.processor:
            written = "tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)"
        return ["AutoTokenizer", "GenerationConfig"], [
            tokenizer,
            'asked = [{"role": "user", "content": "What is asked."}]',
            f"text = {written}",
            'read = tokenizer(text, return_tensors="pt")  # with the marks that its encoder was trained with',
            f"settings = GenerationConfig{settings}",
            "answer = model.generate(**read, generation_config=settings)",
            "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
        ]
    if not exported.objective.causal:
        return ["AutoTokenizer"], [tokenizer, 'print(model(**tokenizer("A text.", return_tensors="pt")).logits)']
    plain = (read_object(exported.run / "summary.json").get("texts") or {}).get("form") == "text"
    ask = (
        ['prompt = tokenizer("Once", add_special_tokens=False, return_tensors="pt")']
        if plain
        else [
            'asked = [{"role": "user", "content": "Hello."}]',
            "prompt = tokenizer.apply_chat_template(",
            '    asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    )
    return ["AutoTokenizer", "GenerationConfig"], [
        tokenizer,
        *ask,
        f"settings = GenerationConfig{settings}",
        "answer = model.generate(**prompt, generation_config=settings)",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]


def _pooled_usage(exported: Exported) -> str:
    length = exported.config.model.max_length
    own = exported.own_lines
    imports = ["import torch", *_loader_imports(exported), "from safetensors.torch import load_file"]
    return "\n".join(
        [
            *(imports if own is None else _loader_imports(exported)),
            "from transformers import AutoModel, AutoTokenizer",
            "",
            'here = "."  # this folder',
            f'tokenizer, head = {_tokenizer_expression(exported)}, load_file(f"{{here}}/{folder.HEAD}")',
            f"model = {_loading_expression(exported, 'AutoModel')}.eval()",
            *(own or []),
            f'batch = tokenizer(["A text."], return_tensors="pt", padding=True, truncation=True, max_length={length})',
            'mask = batch["attention_mask"].unsqueeze(-1)',
            "mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)",
            "features = torch.nn.functional.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5",
            'print(features @ head["classifier.weight"].T + head["classifier.bias"])',
        ]
    )
