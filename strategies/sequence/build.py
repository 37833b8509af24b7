"""From the `continual` section of a config to the body around a strategy, and the combinations that are refused."""

from __future__ import annotations

from fedpeft import registry
from fedpeft.config import Config, ContinualConfig, method, read_options
from fedpeft.continual import curriculum
from fedpeft.continual.body import Body
from fedpeft.continual.head import Head
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective
from fedpeft.privacy.accounting import Release, compose_epsilon
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.sequence.base import ServerBody
from fedpeft.strategies.sequence.general import GeneralServerBody
from fedpeft.strategies.sequence.sequence import TaskSequence


def put_body_around(strategy: FederatedStrategy, config: Config, classes: int | None) -> FederatedStrategy:
    """The strategy with the config's body around it.

    Args:
        classes: of the data, in tasks of which it is to be run; None for one that is only looked at.
    """
    section = config.continual
    compete = registry.load("heads", section.head, "continual.head").loss
    plan = curriculum.make_curriculum(section, classes or section.tasks, config.run.rounds, config.run.seed)
    return TaskSequence(strategy, make_body(section), plan, compete, str(section.body))


def make_body(section: ContinualConfig) -> ServerBody:
    """The server half of the config's body: one of its own where there is one, else the general one.

    Raises:
        InputError: a federation cannot run the body; the message has its reason.
    """
    name = str(section.body)
    central: type[Body] = registry.load("bodies", name, "continual.body")
    if central.stays_central:
        able = [other for other in registry.names("bodies") if not registry.load("bodies", other).stays_central]
        raise InputError(
            f"continual.body={name}: a federation cannot run it, as it {central.stays_central}. Bodies "
            f"that it can run: {', '.join(able)}."
        )
    half = registry.load("server_bodies", name) if name in registry.names("server_bodies") else GeneralServerBody
    made: ServerBody = half(central, **read_options(central, section.options, "continual"))
    return made


def make_head(config: Config, classes: int, width: int) -> Head:
    """The config's head over features of this width."""
    section = config.continual
    registry.load("heads", section.head, "continual.head")
    made: Head = method(
        "heads",
        section.head,
        section.head_options,
        "continual.head_options",
        classes=classes,
        width=width,
        seed=config.run.seed,
    )
    return made


def head_needs_sums(config: Config) -> bool:
    """Whether the config's head is fitted on sums over records, and so asks for them after every task."""
    # Of any size: whether a class has statistics of its own does not hang on it.
    return type(make_head(config, 1, 1)).statistics is not Head.statistics


def check(config: Config) -> None:
    """Refuse what a sequence of tasks cannot be run with, before anything is loaded."""
    section, privacy = config.continual, config.privacy
    # First, and without a body too: noise for sums that nobody asks for would be a setting without effect.
    fitted = section.body is not None and head_needs_sums(config)
    if section.statistics_noise is not None and not (fitted and privacy.unit == "sample"):
        raise InputError(
            f"continual.statistics_noise={section.statistics_noise:g}: it is for heads that are fitted on "
            f"sums (continual.head={section.head}) of private records (privacy.unit={privacy.unit}). Set "
            "it to null."
        )
    if section.body is None:
        return
    body = make_body(section)
    if config.run.rounds % section.learned:
        raise InputError(
            f"continual.tasks={section.learned}: run.rounds={config.run.rounds} is not a multiple of it, "
            "and every task has the same number of rounds."
        )
    if not load_objective(config.model.task).classes:
        raise InputError(f"continual.body: tasks are groups of classes, and model.task={config.model.task} has none.")
    if config.adapter.name not in ("lora", "lora_sb"):
        raise InputError(
            f"adapter.name={config.adapter.name}: continual.body={section.body} works on LoRA's factors. Set "
            "adapter.name=lora, or continual.body=null."
        )
    if not config.adapter.train_head:
        raise InputError(
            "adapter.train_head=false: classes of a new task need rows of the head that can move. Set "
            "adapter.train_head=true."
        )
    refuse_sums_in_the_clear(config, fitted, body)
    if privacy.unit == "sample":
        refuse_uncovered(config, fitted, body)


def refuse_sums_in_the_clear(config: Config, fitted: bool, body: ServerBody) -> None:
    """Refuse sums and sketches beside a protection of the updates that would not hold for them."""
    section = config.continual
    if not (fitted or body.sketches):
        return
    more = f"sums for continual.head={section.head}" if fitted else f"sketches for continual.body={section.body}"
    way = "Set continual.head=linear and a body without sketches (coso: continual.basis=random)."
    if config.privacy.unit == "client":
        raise InputError(
            f"privacy.unit=client: clients would send {more}, which the noise on updates does not cover. {way}"
        )
    if config.secagg.enabled:
        raise InputError(f"secagg.enabled=true: {more} would be sent in the clear. {way}")
    robust = [name for name in config.strategy.names if registry.load("strategies", name).robust]
    if robust:
        raise InputError(f"strategy.wrap: {robust[0]} guards updates, but {more} would go around it. {way}")


def refuse_uncovered(config: Config, fitted: bool, body: ServerBody) -> None:
    """Refuse what sample-level DP with an account for every task does not cover."""
    section, privacy = config.continual, config.privacy
    if privacy.records is not None:
        raise InputError(
            f"privacy.records={privacy.records}: a sequence samples from the records of a task, whose "
            "number this does not give. Set privacy.records=null."
        )
    if body.replays:
        raise InputError(
            f"privacy.unit=sample: continual.body={section.body} shows earlier records again in later "
            "tasks, so their privacy loss would add up over all tasks. Take a body without replay."
        )
    if body.sketches:
        raise InputError(
            f"privacy.unit=sample: continual.body={section.body} sends sketches of records without noise. "
            f"{body.without_sketches}"
        )
    if not fitted:
        return
    if not registry.load("heads", section.head).takes_noise:
        able = [name for name in registry.names("heads") if registry.load("heads", name).takes_noise]
        raise InputError(
            f"privacy.unit=sample: continual.head={section.head} cannot be fitted on noised sums. Heads "
            f"that can: {', '.join(able)}, and linear, which needs none."
        )
    if section.statistics_noise is None:
        raise InputError(
            f"privacy.unit=sample: continual.head={section.head} is fitted on sums over records. Set "
            "continual.statistics_noise (their noise multiplier), or continual.head=linear."
        )
    budget, sums = privacy.epsilon, sums_of_a_task(config)
    if budget is not None and (cost := compose_epsilon(sums, privacy.delta, privacy.accountant)) >= budget:
        raise InputError(
            f"privacy.epsilon={budget:g}: the sums for continual.head={section.head} cost {cost:.4g} of "
            "it for every task, and nothing is left for training. Raise it, or "
            f"continual.statistics_noise={section.statistics_noise:g}."
        )


def sums_of_a_task(config: Config) -> tuple[Release, ...]:
    """What a private client's account of a task pays for beside training: sums over all records, one for each view."""
    section = config.continual
    if section.statistics_noise is None:
        return ()
    return ((1.0, section.statistics_noise, make_body(section).most_views),)
