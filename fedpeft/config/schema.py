"""The sections of a config: what every key means, its default and its bounds. `config` reads and checks them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedpeft import registry
from fedpeft.config.materials import AdapterConfig, DataConfig, ModelConfig, PartitionConfig
from fedpeft.config.option import option
from fedpeft.config.protection import PrivacyConfig, SecAggConfig


@dataclass
class StrategyConfig:
    """Section `strategy`: how the server combines updates; each strategy in `wrap` is around those before it."""

    name: str = option("fedit", "registered strategy")
    weighting: str = option("examples", "client weights: by examples, or all equal", choices=("examples", "uniform"))
    wrap: list[Any] = option(
        [],
        "strategies put around it, innermost first: names, or mappings with name and options",
        options_of=("strategies", "name"),
    )
    options: dict[str, Any] = option({}, "options of the strategy named above")

    @property
    def wrappers(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and options of what is put around the strategy, innermost first."""
        entries = [{"name": entry} if isinstance(entry, str) else entry for entry in self.wrap]
        return [(entry["name"], {key: value for key, value in entry.items() if key != "name"}) for entry in entries]

    @property
    def names(self) -> list[str]:
        """Names of the strategy and of what is put around it."""
        return [self.name, *(name for name, _ in self.wrappers)]


@dataclass
class ClientConfig:
    """Section `client`: a client's training in one round. One of `local_steps` and `local_epochs` is null."""

    optimizer: str = option(
        "adamw", "registered local optimizer, new every round (but keep_optimizer)", table="optimizers"
    )
    optimizer_options: dict[str, Any] = option(
        {}, "options of the optimizer named above", options_of=("optimizers", "optimizer")
    )
    keep_optimizer: bool = option(
        False, "go on with the state that the client's optimizer had after its last round, kept on the client's disk"
    )
    lr: float = option(1e-3, "local learning rate; with a schedule the largest", above=0)
    schedule: str = option("constant", "how the rate falls from lr to min_lr", choices=("constant", "linear", "cosine"))
    schedule_over: str = option(
        "rounds",
        "rounds: from round to round of the run, constant inside one; steps: over the steps of all rounds, as "
        "transformers does; round: over the steps of each round anew",
        choices=("rounds", "steps", "round"),
    )
    warmup_rounds: float = option(0.0, "rounds over which the rate rises to lr; of steps also part of one", low=0)
    min_lr: float = option(0.0, "rate at the end of a schedule", low=0)
    momentum: float = option(0.0, "of sgd", low=0, high=0.9999)
    weight_decay: float = option(0.0, "decoupled; for sgd L2", low=0)
    local_steps: int | None = option(None, "optimizer steps a round; give this or local_epochs", low=1)
    local_epochs: int | None = option(1, "passes over the client's data a round; give this or local_steps", low=1)
    batch_size: int = option(16, "examples a step", low=1)
    micro_batch: int | None = option(
        None, "take a step's examples in pieces of so many, whose gradients add up: less memory, the same step", low=1
    )
    max_grad_norm: float | None = option(None, "clip the gradient of a step to this norm", above=0)
    memory_mb: list[float] | None = option(
        None,
        "MB that training may take at a client, memory_mb[i mod length] of client i, beside Python and its libraries: "
        "each has the largest rank <= adapter.r that fits, which stands in resolved.yaml as adapter.client_ranks",
    )
    loss_weighting: str = option(
        "record",
        "of a language model: record, a batch's loss is the mean over its records of the mean over each one's tokens; "
        "token, the mean over all its tokens, so long answers count more",
        choices=("record", "token"),
    )


@dataclass
class GenerateConfig:
    """Section `evaluation.generate`: answers that a language model gives to test conversations, beside those wanted."""

    records: int = option(0, "test conversations whose last answer is generated after the last round; 0 is none", low=0)
    max_new_tokens: int = option(64, "longest answer in tokens", low=1)


@dataclass
class EvaluationConfig:
    """Section `evaluation`: what is looked at of the model after the last round, beside its scores."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)


@dataclass
class TTAConfig:
    """Section `tta`: the test-time method that every client runs on a stream of its own, and what shifts the stream."""

    method: str | None = option(
        None,
        "registered test-time method that every client runs on a stream of its own whenever it evaluates; null is none",
    )
    batch_size: int = option(32, "rows in a batch of the stream", low=1, high=200)
    corruption: str = option(
        "per_client",
        "what happens to a client's held-out images: the name of a corruption; "
        "per_client, one for each client; sequence, one after another; clean, nothing",
    )
    severity: int = option(5, "of the corruption", low=1, high=5)
    keep: bool = option(False, "go on from what was learned at the last evaluation instead of afresh")
    options: dict[str, Any] = option({}, "options of the method named above")


@dataclass
class ContinualConfig:
    """Section `continual`: a sequence of tasks that the federation learns one after another."""

    body: str | None = option(
        None, "how the federation learns a sequence of tasks (a registered body); null is no sequence"
    )
    options: dict[str, Any] = option({}, "options of the body named above")
    tasks: int = option(5, "tasks: groups of classes in a random order, each for run.rounds / tasks rounds", low=1)
    shuffle: bool = option(True, "draw the order of the classes; else they come as they are numbered")
    leave_out: list[int] = option(
        [], "tasks, by number from 0 on, that are never learned, nor have rounds: the yardstick of unlearning them"
    )
    head: str = option("linear", "registered head that answers")
    head_options: dict[str, Any] = option({}, "options of the head named above", options_of=("heads", "head"))
    statistics_noise: float | None = option(
        None, "unit sample: noise multiplier of the sums that a head is fitted on, one release a task", above=0
    )

    @property
    def learned(self) -> int:
        """How many tasks are learned."""
        return self.tasks - len(set(self.leave_out))


@dataclass
class RunConfig:
    """Section `run`: how long a run is, on what it runs, and what a round does when clients fail."""

    rounds: int = option(10, "federated rounds", low=1)
    clients_per_round: int | None = option(None, "clients asked each round; null is all", low=1)
    seed: int = option(0, "root of every random choice", low=0)
    engine: str = option(
        "cohort",
        "cohort: in this process or in worker processes; ray: in Ray actors, on several "
        "GPUs or machines; sites: real ones (set by `fedpeft server run`)",
        choices=("cohort", "ray", "sites"),
    )
    workers: int = option(0, "worker processes; 0 trains clients in this process (Ray takes 1)", low=0)
    cohort_tokens: int | None = option(
        None,
        "tokens (or image patches) of a pass over many clients together; 0 trains "
        "one after another; null is 2048 on a CPU and 16384 elsewhere, and fewer where a pass would keep "
        "more than 256 MiB, 4 GiB elsewhere",
        low=0,
    )
    evaluate_tokens: int = option(
        2**15,
        "tokens (or image patches) of a pass of an evaluation, of at most 256 records; of a language model fewer where "
        "their scores would take more than 256 MB",
        low=1,
    )
    threads: int = option(1, "threads per process", low=1)
    device: str = option("auto", "torch device; auto takes an accelerator when there is one")
    evaluate_every: int = option(1, "rounds between evaluations of the global model; the last one always is", low=1)
    metric: str | None = option(
        None,
        "the measure that a run's headline names first: accuracy, loss, or one of the objective's (f1, auroc, "
        "average_precision, ece; of language models exact_match, perplexity); null is accuracy, or perplexity",
    )
    trackers: list[str] = option(
        [],
        "registered trackers that are told the run's numbers, config, plots and adapter (tensorboard, wandb, mlflow), "
        "which pip's extra fedpeft[trackers] installs",
    )
    baselines: bool = option(True, "fit logistic regressions on frozen features and on pixels or words, for the table")
    trained_baselines: list[str] = option(
        [],
        "models trained without a federation beside the run, each at about its cost: local, every client alone; "
        "central, one on all clients' records",
    )
    checkpoint_every: int = option(1, "rounds between checkpoints", low=1)
    # Two at least: where the newest is damaged, a run goes on from the one before.
    keep_checkpoints: int | None = option(2, "newest checkpoints that are kept, to be exported; null is all", low=2)
    best: str | None = option(
        None, "measure by which the best round is kept apart, on clients' held-out records (data.holdout); null is none"
    )
    patience: int | None = option(None, "evaluated rounds no better by run.best after which a run ends", low=1)
    max_traffic_mb: float | None = option(
        None,
        "stop, with what is reached, before the round that would bring the bytes of all rounds above this",
        above=0,
    )
    deadline_s: float | None = option(None, "seconds that a round waits for replies; needs workers or ray", above=0)
    quorum: float = option(0.5, "share of the asked clients whose good replies a round needs", above=0, high=1)
    max_update_norm: float | None = option(None, "quarantine updates farther from what was sent (L2)", above=0)
    faults: dict[str, Any] = option(
        {}, "client name -> fault to inject (nan, scale, shape, empty, crash, die, hang): for tests of robustness"
    )


@dataclass
class NoOptions:
    """Of a method without options."""


class Configured:
    """What a registry names. Its options and their defaults are declared once, in `Config`, and read as `self.config`.

    Attributes:
        paper: where the method comes from.
    """

    Config: ClassVar[Any] = NoOptions
    paper: ClassVar[str] = ""
    config: Any = NoOptions()  # of a subclass with an `__init__` of its own

    def __init__(self, **options: Any) -> None:
        self.config = self.Config(**options)


@dataclass
class Config:
    """A whole run as its YAML says it; every section may be left out, and then has its defaults."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    secagg: SecAggConfig = field(default_factory=SecAggConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tta: TTAConfig = field(default_factory=TTAConfig)
    continual: ContinualConfig = field(default_factory=ContinualConfig)

    @property
    def unequal_ranks(self) -> str:
        """The key and value by which ranks of clients may differ; empty where they do not."""
        if self.client.memory_mb is not None:
            return f"client.memory_mb={self.client.memory_mb}"
        return f"adapter.client_ranks={self.adapter.client_ranks}" if self.adapter.client_ranks else ""


@dataclass(frozen=True)
class MethodSection:
    """A section of the config that names a registered method: the method's table, its class, and the name's key."""

    table: str
    config: Any
    key: str = "name"


METHOD_SECTIONS = {
    "strategy": MethodSection("strategies", StrategyConfig),
    "adapter": MethodSection("adapters", AdapterConfig),
    "data.partition": MethodSection("partitioners", PartitionConfig),
    "tta": MethodSection("tta", TTAConfig, "method"),
    "continual": MethodSection("bodies", ContinualConfig, "body"),
}


def options_of(cls: Any, where: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Option name (as users write it) -> dataclass field of a registered class's `Config`.

    A field that would be a Python keyword has a trailing underscore that users do not write (`lambda_` is `lambda`).

    Args:
        where: LEARNER or FEDERATION, to leave out what means nothing there; empty is all.
    """
    config = getattr(cls, "Config", None)
    items = dataclasses.fields(config) if config else ()
    return {item.name.rstrip("_"): item for item in items if not where or item.metadata.get("only", "") in ("", where)}


def choices_of(item: dataclasses.Field[Any]) -> list[str]:
    """The values that a field may have, as users write them; empty where they are not counted."""
    table = item.metadata.get("table")
    return registry.names(table) if table else [str(choice) for choice in item.metadata.get("choices", ())]


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The default of a field, a new object at every call where it is mutable; MISSING where there is none."""
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
