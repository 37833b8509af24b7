"""What the coordinator sends with every message, and what a site makes of it.

A message has tensors, a task, and this record: the run's name, its config as YAML, the classes, a fingerprint of the
base model. A site checks the config as strictly as a local one (names come from the registry, nothing else is a key)
and puts its own values where they are its own to decide: data, columns, model, device, policy, randomness.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from flwr.app import ConfigRecord, Message, RecordDict

from fedpeft import config as configs
from fedpeft.clients import policy as policies
from fedpeft.clients.policy import Policy, Refused
from fedpeft.config import Config
from fedpeft.deploy import settings
from fedpeft.deploy.settings import Site
from fedpeft.errors import InputError

if TYPE_CHECKING:
    from fedpeft.models import Base

RECORD = "fedpeft.run"
LONGEST = 100_000
SHARED = ("clients", "holdout", "labels")  # of the data section: what a run says, not a site


@dataclass(frozen=True)
class Envelope:
    """What comes with every message of a run."""

    run: str
    config: str
    labels: tuple[str, ...]
    base: str

    def account(self, config: Config) -> str:
        """The run's name in the ledger.

        In a sequence its tasks are accounts apart, so one that cuts the classes otherwise is another run, whatever the
        coordinator calls it.
        """
        if config.continual.body is None:
            return self.run
        return f"{self.run}#{hashlib.sha256(repr((self.config, self.labels)).encode()).hexdigest()[:12]}"

    def put(self, message: Message, site: str) -> None:
        message.content[RECORD] = ConfigRecord({"run": self.run, "config": self.config, "labels": list(self.labels),
                                                "base": self.base, "site": site})


def opened(content: RecordDict, site: Site) -> Envelope:
    """Take the record out of a message.

    Raises:
        Refused: there is none, it is malformed, or it is for another site.
    """
    record = content.config_records.get(RECORD)
    try:
        if record is None:
            raise KeyError(RECORD)
        found: dict[str, Any] = {key: record[key] for key in ("run", "config", "labels", "base", "site")}
        labels = tuple(str(label) for label in found["labels"])
        envelope = Envelope(str(found["run"]), str(found["config"]), labels, str(found["base"]))
    except (KeyError, TypeError) as error:
        raise Refused(f"the message does not say what run it is of: {error!r}. Is the coordinator's fedpeft of "
                      "another version?") from error
    if found["site"] != site.settings.name:
        raise Refused(f"the coordinator calls this site '{found['site']}'; site.yaml says '{site.settings.name}'.")
    if not settings.NAME.fullmatch(envelope.run) or len(envelope.config) > LONGEST:
        raise Refused("the run's name or config is not one that fedpeft makes.")
    return envelope


def own_config(text: str, site: Site, bounds: Policy) -> Config:
    """The config that this site runs: the coordinator's, checked, with the site's own values.

    Raises:
        Refused: it asks for what no coordinator may ask.
    """
    if "${" in text:
        raise Refused("the config has an interpolation (${...}), which would read this site's environment.")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refused("the config is no YAML.") from error
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key) or {}, dict) for key in tree):
        raise Refused("the config is no mapping of sections.")
    model, run, privacy, data = ({**(tree.get(key) or {})} for key in ("model", "run", "privacy", "data"))
    if model.get("trust_remote_code"):
        raise Refused("model.trust_remote_code: no code of a model is run here.")
    if run.get("faults"):
        raise Refused("run.faults: a simulation only.")
    own = site.settings
    model["name"] = own.model
    run |= {"device": own.device, "threads": own.threads, "workers": 0, "engine": "sites"}
    privacy["policy"] = str(site.policy)
    if not bounds.seeded_noise:
        privacy["randomness"] = "os"
    columns = {key: getattr(own.data, key) for key in ("text", "image", "label")}
    data = {**{key: data[key] for key in SHARED if key in data}, **columns, "source": own.data.source}
    try:
        return configs.load({**tree, "model": model, "run": run, "privacy": privacy, "data": data})
    except InputError as error:
        raise Refused(f"the config is not valid here: {error}") from error


def admitted(envelope: Envelope, site: Site, number: int) -> Config:
    """The config of a message that the site's policy allows. No record and no model has been read by then.

    Raises:
        Refused: with every reason.
    """
    bounds = policies.load(site.policy)
    config = own_config(envelope.config, site, bounds)
    bounds.require(config, number)
    return config


def base_fingerprint(base: Base) -> str:
    """A short hash of the frozen base: names, shapes and the first values of every parameter."""
    digest = hashlib.sha256()
    for name, value in sorted(base.backbone.named_parameters()):
        if value.requires_grad or ".lora_" in name:
            continue
        first = value.detach().flatten()[:8].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(value.shape)}".encode() + first)
    return digest.hexdigest()[:16]


def classes(config: Config, found: list[str] | None) -> list[str]:
    """Label names of a run: the config's, else those of the coordinator's own test set.

    Raises:
        InputError: nobody says what the classes are.
    """
    if config.model.task == "causal-lm":
        return ["all"]
    names: Any = config.data.labels or found
    if not names:
        raise InputError("data.labels: sites have parts of the data, so the config must name the classes in their "
                         "order, data.labels=[no,yes], or data.test must be a test set that has all of them.")
    return [str(name) for name in names]
