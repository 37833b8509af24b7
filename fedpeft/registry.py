"""Tables "name" -> "module:Class". Strings only, so that importing fedpeft imports no method.

Another package adds entries through entry points of the group `fedpeft.<table>`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from fedpeft.errors import InputError

TABLES: dict[str, dict[str, str]] = {
    "strategies": {
        "fedit": "fedpeft.strategies.fedit:FedIT",
        "ffa_lora": "fedpeft.strategies.ffa_lora:FFALoRA",
        "fedsvd": "fedpeft.strategies.fedsvd:FedSVD",
        "lora_fair": "fedpeft.strategies.lora_fair:LoRAFAIR",
        "flora": "fedpeft.strategies.flora:FLoRA",
        "flexlora": "fedpeft.strategies.flexlora:FlexLoRA",
        "hetlora": "fedpeft.strategies.hetlora:HetLoRA",
        "fedex": "fedpeft.strategies.fedex:FedEx",
        "rolora": "fedpeft.strategies.rolora:RoLoRA",
        "fedsa": "fedpeft.strategies.fedsa:FedSA",
        "fed_sb": "fedpeft.strategies.fed_sb:FedSB",
        "flower": "fedpeft.strategies.flower:FlowerRule",
        "fedprox": "fedpeft.strategies.fedprox:FedProx",
        "scaffold": "fedpeft.strategies.scaffold:Scaffold",
        "fedadam": "fedpeft.strategies.fedopt:FedAdam",
        "fedyogi": "fedpeft.strategies.fedopt:FedYogi",
        "fedadagrad": "fedpeft.strategies.fedopt:FedAdagrad",
        "norm_clip": "fedpeft.strategies.norm_clip:NormClip",
        "trimmed_mean": "fedpeft.strategies.trimmed_mean:TrimmedMean",
        "median": "fedpeft.strategies.median:Median",
        "krum": "fedpeft.strategies.krum:Krum",
    },
    "adapters": {
        "lora": "fedpeft.adapters.lora:Lora",
        "lora_sb": "fedpeft.adapters.lora_sb:LoraSB",
    },
    "datasets": {
        "digits": "fedpeft.data.digits:Digits",
        "docstrings": "fedpeft.data.docstrings:Docstrings",
    },
    "tta": {
        "source": "fedpeft.tta.source:Source",
        "aug_average": "fedpeft.tta.aug_average:AugAverage",
        "em_prior": "fedpeft.tta.em_prior:EMPrior",
        "bn_adapt": "fedpeft.tta.bn_adapt:BNAdapt",
        "rdumb": "fedpeft.tta.rdumb:RDumb",
        "lame": "fedpeft.tta.lame:LAME",
        "tent": "fedpeft.tta.tent:Tent",
        "eata": "fedpeft.tta.eata:EATA",
        "sar": "fedpeft.tta.sar:SAR",
        "rotta": "fedpeft.tta.rotta:RoTTA",
        "memo": "fedpeft.tta.memo:MEMO",
        "t3a": "fedpeft.tta.t3a:T3A",
        "cotta": "fedpeft.tta.cotta:CoTTA",
        "petal": "fedpeft.tta.petal:PETAL",
        "lsa": "fedpeft.tta.lsa:LabelShiftAdapter",
        "itta": "fedpeft.tta.itta:ITTA",
        "roid": "fedpeft.tta.roid:ROID",
    },
    "bodies": {
        "frozen": "fedpeft.continual.bodies.frozen:Frozen",
        "sequential": "fedpeft.continual.bodies.sequential:Sequential",
    },
    "heads": {
        "linear": "fedpeft.continual.heads.linear:Linear",
        "masked": "fedpeft.continual.heads.masked:Masked",
        "lda": "fedpeft.continual.heads.lda:LDA",
    },
    "checks": {
        "strategy": "fedpeft.strategies.build:check",
        "secagg": "fedpeft.strategies.secagg:check",
        "client_dp": "fedpeft.strategies.client_dp:check",
        "privacy": "fedpeft.clients.private:check",
    },
    "partitioners": {
        "iid": "fedpeft.data.partition:IID",
        "dirichlet": "fedpeft.data.partition:Dirichlet",
        "column": "fedpeft.data.partition:Column",
        "shards": "fedpeft.data.partition:Shards",
        "quantity": "fedpeft.data.partition:Quantity",
    },
}


@cache
def table(kind: str) -> dict[str, str]:
    """All entries of one table, other packages' entry points included."""
    found = {point.name: point.value for point in entry_points(group=f"fedpeft.{kind}")}
    return {**found, **TABLES[kind]}


def names(kind: str) -> list[str]:
    return list(table(kind))


def load(kind: str, name: str, key: str | None = None) -> Any:
    """The object registered as `name`; `key` is the config key to blame when there is none."""
    entries = table(kind)
    if name not in entries:
        raise InputError(unknown(key or kind, name, entries))
    module, _, attribute = entries[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def unknown(key: str, given: object, allowed: Iterable[str]) -> str:
    """The message for a name that is not allowed: key, what was given, what is allowed, the nearest.

    >>> print(unknown("strategy.name", "fedsdv", ["fedit", "fedsvd"]))
    strategy.name: 'fedsdv' is not known. Did you mean 'fedsvd'? Allowed: fedit, fedsvd.
    """
    allowed = list(allowed)
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"{key}: '{given}' is not known.{hint} Allowed: {', '.join(allowed)}."
