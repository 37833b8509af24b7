"""The sections of a config that say what is trained on what: model, adapter, data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedpeft.config.option import option


@dataclass
class ModelConfig:
    """Section `model`: the frozen base that every client has, and what it is trained to do."""

    name: str = option(
        "tiny-vit",
        "embedded (tiny-vit, tiny-bert, tiny-llama, tiny-t5) or prepared model, local path or hub id",
        path=True,
    )
    task: str = option(
        "image-classification", "what the model is trained to do: a registered objective", table="objectives"
    )
    task_options: dict[str, Any] = option({}, "options of the task named above", options_of=("objectives", "task"))
    pooling: str = option(
        "auto",
        "text classification head: the model's own, or a linear one on mean-pooled features; "
        "auto is mean for sentence encoders",
        choices=("auto", "model", "mean"),
    )
    max_length: int = option(128, "longest input in tokens; longer texts are cut, which is counted and said", low=1)
    dtype: str = option(
        "float32",
        "dtype of the frozen base; auto is bfloat16 where a run finds the base's products at least 1.5 times faster in "
        "it, and stands in resolved.yaml as what it came to; with real sites it is float32",
        choices=("float32", "bfloat16", "auto"),
    )
    batched_attention: int | None = option(
        None,
        "longest input in tokens whose attention is computed in bfloat16 as batched products, not in torch's fused "
        "form; null is 0, none, and with model.dtype=auto on a processor up to where a run finds them faster",
        low=0,
    )
    quantization: str | None = option(
        None,
        "keep the base's linear layers in few bits (the extra `quantized`): nf4 in 4, int8 in 8; null leaves them as "
        "they are, or takes what a base is that was quantised before",
        choices=("nf4", "int8"),
    )
    gradient_checkpointing: bool = option(
        False, "keep only each block's inputs for the backward pass and compute the rest again: less memory, more time"
    )
    trust_remote_code: bool = option(False, "let transformers run code that comes with the model")


@dataclass
class AdapterConfig:
    """Section `adapter`: what trains and travels; everything else of the model is frozen."""

    name: str = option("lora", "registered adapter")
    r: int = option(4, "rank", low=1)
    alpha: float = option(8.0, "scale: the product is multiplied by alpha / r (alpha / sqrt(r) with rslora)", above=0)
    rslora: bool = option(False, "scale by alpha / sqrt(r)")
    dropout: float = option(0.0, "dropout before A", low=0, high=0.99)
    target_modules: list[str] | None = option(
        None,
        "module name endings to adapt; looked up per architecture when null; "
        "['all-linear'] adapts every linear layer but the head",
    )
    train_head: bool = option(True, "train and share the classification head too")
    client_ranks: list[int] | None = option(
        None, "rank of client i is client_ranks[i mod length]; every rank <= r; the scale stays that of r"
    )
    start: str | None = option(
        None,
        "folder of an adapter to go on from, a run's or peft's LoRA, of this form; null draws a fresh one",
        path=True,
    )
    penalty: str | None = option(None, "registered term of the loss beside the task's; null is none", table="penalties")
    penalty_options: dict[str, Any] = option(
        {}, "options of the penalty named above", options_of=("penalties", "penalty")
    )
    options: dict[str, Any] = option({}, "options of the adapter named above")


@dataclass
class PartitionConfig:
    """Section `data.partition`: how the training records are dealt to simulated clients."""

    name: str = option("dirichlet", "registered partitioner")
    options: dict[str, Any] = option({}, "options of the partitioner named above")


@dataclass
class DataConfig:
    """Section `data`: where records come from, which columns of them count, and how clients share them."""

    source: str = option(
        "digits", "embedded or prepared data set, file (csv, jsonl, parquet, ...), folder or hub id", path=True
    )
    test: str | None = option(
        None, "file or folder with the test set; else test_fraction of the source is held out", path=True
    )
    test_fraction: float = option(0.25, "share of the source held out for the server's test set", above=0, high=0.9)
    text: str | None = option(None, "text column; found by name when null")
    image: str | None = option(None, "image column; found by name when null")
    label: str | None = option(None, "label column; found by name when null")
    columns: dict[str, Any] = option(
        {},
        "columns of conversations by what is in them, where their names do not say it: {messages: NAME}, "
        "{conversations: NAME}, {prompt: NAME, completion: NAME}, {question: NAME, answer: NAME} or "
        "{instruction: NAME, input: NAME, output: NAME}; each may have system: NAME beside",
    )
    template: str | None = option(
        None,
        "how conversations are written: alpaca, chatml, plain, vicuna, or the path of a Jinja file; null is the "
        "tokenizer's own template, and where it has none alpaca for instructions, plain for all else",
        path=True,
    )
    loss_on: str = option(
        "response", "what of a conversation is learned: what the assistant says, or all", choices=("response", "all")
    )
    truncate: str = option(
        "end",
        "what a language model's text of over model.max_length tokens loses: its end, its start, or drop: all of it",
        choices=("end", "start", "drop"),
    )
    skip_bad: bool = option(
        False, "leave out records that are no conversation, and count them; else the first one is an error"
    )
    label_separator: str | None = option(
        None, "what stands between the labels, or the numbers, of one record in a text; null where the column has lists"
    )
    format: dict[str, Any] = option({}, "how a csv or tsv is written: {delimiter: semicolon, encoding: windows-1252}")
    train_split: str | None = option(None, "split of a data set, or folder of pictures, to learn from; null is train")
    test_split: str | None = option(None, "likewise the test set, of data.test if set; null is test, else validation")
    revision: str | None = option(None, "branch, tag or commit of a data set of the hub")
    labels: list[str] | None = option(None, "class names in their order; null takes those of the source, sorted")
    cache: str | None = option(
        None,
        "folder where what was read and tokenized is kept for later runs, whatever its size; null keeps that of files "
        "of 8 MB and more in .fedpeft-cache beside the folder of the run",
        path=True,
    )
    augment: list[str] = option(
        [], "what is done to pictures that are trained on, anew every round: crop, flip, colour"
    )
    limit: int | None = option(None, "use at most this many training records", low=1)
    clients: int | None = option(
        10,
        "how many clients the data is split over; null, the default with data.partition="
        "column, is all groups of the column",
        low=1,
    )
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    split: str | None = option(None, "reuse the split saved in this split.json", path=True)
    holdout: float = option(0.0, "share of each client's records kept for its own evaluation", low=0, high=0.9)

    @property
    def count(self) -> int:
        """Number of clients, once the data have said it where `clients` is null."""
        assert self.clients is not None
        return self.clients
