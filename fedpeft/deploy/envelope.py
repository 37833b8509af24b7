"""The coordinator sends an envelope with every message, of which a site makes the config that it runs.

A message has tensors, a task, and this record: the run's name, its config as YAML, the classes, a fingerprint of the
base model. A site checks the config as strictly as a local one (names come from the registry, nothing else is a key)
and puts its own values where they are its own to decide: data, columns, model, device, policy, randomness.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedpeft import config as configs
from fedpeft import extras, foreign
from fedpeft.clients import policy as policies
from fedpeft.clients.policy import Policy, Refused
from fedpeft.config import Config
from fedpeft.data.wording import TEMPLATES
from fedpeft.deploy import settings
from fedpeft.deploy.settings import Site
from fedpeft.errors import InputError
from fedpeft.foreign import shown
from fedpeft.objectives.base import load_objective

if TYPE_CHECKING:
    from fedpeft.models.base import Base

log = logging.getLogger("fedpeft")
RECORD = "fedpeft.run"
LABELS, LABEL_BYTES = 32_768, 256
NAME = re.compile(r"[\w./ -]{0,200}")  # of layers and of choices; a search for it ends
# Of `data`: what a run says, not a site.
SHARED = ("clients", "holdout", "labels", "template", "loss_on", "truncate", "augment")


@dataclass(frozen=True)
class Envelope:
    """What comes with every message of a run."""

    run: str
    config: str
    labels: tuple[str, ...]
    base: str

    def require(self) -> None:
        """Raise InputError unless names are names and lengths are within bounds."""
        if not settings.NAME.fullmatch(self.run) or not re.fullmatch("[0-9a-f]{0,64}", self.base):
            raise InputError("the run's name or its base model's fingerprint is not one that fedpeft makes.")
        if len(self.config) > foreign.YAML_BYTES:
            raise InputError(
                f"the run's config has {len(self.config)} characters; at most {foreign.YAML_BYTES} bytes "
                "are read by a site."
            )
        if len(self.labels) > LABELS or any(len(label) > LABEL_BYTES for label in self.labels):
            raise InputError(
                f"data.labels: {len(self.labels)} classes, the longest name of "
                f"{max(map(len, self.labels))} characters; at most {LABELS} and {LABEL_BYTES} are read."
            )

    def account(self, config: Config) -> str:
        """The run's name in the ledger.

        In a sequence its tasks are accounts apart, so one that cuts the classes otherwise is another run, whatever the
        coordinator calls it.
        """
        if config.continual.body is None:
            return self.run
        return f"{self.run}#{hashlib.sha256(repr((self.config, self.labels)).encode()).hexdigest()[:12]}"

    def put(self, message: Message, site: str) -> None:
        """Put the run's config, labels and base into a message, addressed to one site."""
        message.content[RECORD] = ConfigRecord(
            {"run": self.run, "config": self.config, "labels": list(self.labels), "base": self.base, "site": site}
        )


def opened(content: RecordDict, site: Site) -> Envelope:
    """Take the record out of a message.

    Raises:
        Refused: there is none, it is malformed, or it is for another site.
    """
    record = content.config_records.get(RECORD)
    keys = ("run", "config", "base", "site")
    if (
        record is None
        or any(not isinstance(record.get(key), str) for key in keys)
        or not _are_texts(record.get("labels"))
    ):
        raise Refused("the message does not say what run it is of. Is the coordinator's fedpeft of another version?")
    run, config, base, name = (str(record[key]) for key in keys)
    envelope = Envelope(run, config, tuple(record["labels"]), base)  # type: ignore[arg-type]
    try:
        envelope.require()
    except InputError as error:
        raise Refused(str(error)) from error
    if name != site.settings.name:
        raise Refused(
            f"the coordinator calls this site '{foreign.shown(name, 100)}'; site.yaml says '{site.settings.name}'."
        )
    return envelope


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def own_config(text: str, site: Site, bounds: Policy) -> Config:
    """The config that this site runs: the coordinator's, checked, with the site's own values.

    Raises:
        Refused: it asks for what no coordinator may ask.
    """
    # In the text, before it reaches OmegaConf, which would resolve it.
    if "${" in text:
        raise Refused("the config has an interpolation (${...}), which would read this site's environment.")
    try:
        tree = foreign.read_yaml(text, "the config")
    except InputError as error:
        raise Refused(str(error)) from error
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key) or {}, dict) for key in tree):
        raise Refused("the config is no mapping of sections.")
    model, run, privacy, data, adapter = (
        {**(tree.get(key) or {})} for key in ("model", "run", "privacy", "data", "adapter")
    )
    if model.get("trust_remote_code"):
        raise Refused("model.trust_remote_code: no code of a model is run here.")
    if model.get("dtype") == "auto":
        raise Refused("model.dtype=auto: all sites have one base, in the dtype that the coordinator names.")
    if run.get("faults"):
        raise Refused("run.faults: a simulation only.")
    own = site.settings
    model["name"] = own.model
    # What the server says of these is not looked at: a site decides how and on what it computes, and who is told.
    run |= {"device": own.device, "threads": own.threads, "workers": 0, "engine": "sites", "trackers": []}
    privacy["policy"] = str(site.policy)
    adapter["start"] = None  # the coordinator's: a site is sent all of it
    options = {key: value for key, value in adapter.items() if key != "name"}  # which the registry has
    if odd := next((text for text in _all_texts(options) if not NAME.fullmatch(text)), None):
        raise Refused(
            f"adapter: {shown(odd)!r} is a pattern, and a search for a coordinator's could take for ever. Name layers, "
            "or the ends of their names, in a list."
        )
    # Whatever the server asked for: noise that it can draw again is no noise to it.
    if not bounds.seeded_noise:
        privacy["randomness"] = "os"
    if data.get("template") not in (None, *TEMPLATES):
        raise Refused(f"data.template: a file is not read for a coordinator; it may be one of {', '.join(TEMPLATES)}.")
    # Built up key by key, so that one that comes to the data section later cannot slip through.
    data = {**{key: data[key] for key in SHARED if key in data}, **asdict(own.data)}
    try:
        own_sections = {"model": model, "run": run, "privacy": privacy, "data": data, "adapter": adapter}
        config = configs.load({**tree, **own_sections}, foreign=True)
        extras.require_of_run(config)
        return config
    except InputError as error:
        raise Refused(f"the config is not valid here: {error}") from error


def _all_texts(tree: Any) -> Iterator[str]:
    """All texts in a tree, keys among them."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for part in [*tree, *tree.values()] if isinstance(tree, dict) else tree:
            yield from _all_texts(part)


def in_force(site: Site) -> Policy:
    """The site's policy as it is now.

    Raises:
        Refused: it is none; what is wrong with it stands in the site's log only.
    """
    try:
        return policies.load(site.policy)
    except InputError as error:
        log.error("the policy: %s", error)
        raise Refused(policies.INVALID) from error


def admitted(envelope: Envelope, site: Site, bounds: Policy, number: int) -> Config:
    """The config of a message that the site's policy allows. No record and no model has been read by then.

    Raises:
        Refused: with every reason.
    """
    config = own_config(envelope.config, site, bounds)
    bounds.require(config, number)
    return config


def base_fingerprint(base: Base, config: Config) -> str:
    """Hash of all values that the run does not train, at the coordinator as at a site."""
    from fedpeft.models import loading

    return loading.fingerprint(base, heads=not config.adapter.train_head)


def classes(config: Config, found: list[str] | None) -> list[str]:
    """Label names of a run: the config's, else those of the coordinator's own test set.

    Raises:
        InputError: nobody says what the classes are.
    """
    if not load_objective(config.model.task).headed:
        return ["all"]
    names: Any = config.data.labels or found
    if not names:
        raise InputError(
            "data.labels: sites have parts of the data, so the config must name the classes in their "
            "order, data.labels=[no,yes], or data.test must be a test set that has all of them."
        )
    return [str(name) for name in names]
