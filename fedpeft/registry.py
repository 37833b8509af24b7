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
        "atp": "fedpeft.strategies.atp:ATP",
        "fedthe": "fedpeft.strategies.fedthe:FedTHE",
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
        "tlm": "fedpeft.tta.tlm:TLM",
        "ear": "fedpeft.tta.ear:EAR",
        "atp": "fedpeft.tta.atp:ATP",
        "fedthe": "fedpeft.tta.fedthe:FedTHE",
    },
    "bodies": {
        "frozen": "fedpeft.continual.bodies.frozen:Frozen",
        "sequential": "fedpeft.continual.bodies.sequential:Sequential",
        "coso": "fedpeft.continual.bodies.coso:CoSO",
        "ewc": "fedpeft.continual.bodies.ewc:EWC",
        "lwf": "fedpeft.continual.bodies.lwf:LwF",
        "er": "fedpeft.continual.bodies.er:ER",
        "joint": "fedpeft.continual.bodies.joint:Joint",
        "classp": "fedpeft.continual.bodies.classp:CLASSP",
        "fsa": "fedpeft.continual.bodies.fsa:FSA",
        "olora": "fedpeft.continual.bodies.olora:OLoRA",
        "inflora": "fedpeft.continual.bodies.inflora:InfLoRA",
        "sdlora": "fedpeft.continual.bodies.sdlora:SDLoRA",
        "owlora": "fedpeft.continual.bodies.owlora:OWLoRA",
        "conpet_static": "fedpeft.continual.bodies.conpet_static:ConPETStatic",
        "conpet": "fedpeft.continual.bodies.conpet:ConPET",
        "lae": "fedpeft.continual.bodies.lae:LAE",
        "merging": "fedpeft.continual.bodies.merging:Merging",
        "factor_coso": "fedpeft.continual.bodies.factor_coso:FactorCoSO",
    },
    "server_bodies": {
        "sequential": "fedpeft.strategies.learning.sequential:Sequential",
        "factor_coso": "fedpeft.strategies.learning.factor_coso:FactorCoSO",
        "coso": "fedpeft.strategies.learning.coso:CoSO",
        "lae": "fedpeft.strategies.learning.lae:LAE",
        "conpet_static": "fedpeft.strategies.learning.conpet_static:ConPETStatic",
    },
    "heads": {
        "linear": "fedpeft.continual.heads.linear:Linear",
        "masked": "fedpeft.continual.heads.masked:Masked",
        "lda": "fedpeft.continual.heads.lda:LDA",
        "ncm": "fedpeft.continual.heads.ncm:NCM",
        "ranpac": "fedpeft.continual.heads.ranpac:RanPAC",
        "aligned": "fedpeft.continual.heads.aligned:Aligned",
    },
    "streams": {
        "digits5": "fedpeft.continual.streams.digits5:Digits5",
        "glyph1d": "fedpeft.continual.streams.glyph1d:Glyph1D",
        "glyph1d_domain": "fedpeft.continual.streams.glyph1d_domain:Glyph1DDomain",
        "glyph1d_blurry": "fedpeft.continual.streams.glyph1d_blurry:Glyph1DBlurry",
        "text": "fedpeft.continual.streams.text:Text",
        "records": "fedpeft.continual.streams.records:Records",
        "wordnet": "fedpeft.continual.streams.wordnet:WordNet",
        "glyphs": "fedpeft.continual.streams.glyphs:Glyphs",
    },
    "mergers": {
        "running_average": "fedpeft.merging.running_average:RunningAverage",
        "task_arithmetic": "fedpeft.merging.task_arithmetic:TaskArithmetic",
        "metrics_weighted": "fedpeft.merging.metrics_weighted:MetricsWeighted",
        "opcm": "fedpeft.merging.opcm:OPCM",
        "orthogonal_adaptation": "fedpeft.merging.orthogonal_adaptation:OrthogonalAdaptation",
        "lora_lego": "fedpeft.merging.lora_lego:LoRALego",
        "reversible": "fedpeft.merging.reversible:Reversible",
        "lora_squeeze": "fedpeft.merging.lora_squeeze:LoRASqueeze",
    },
    "checks": {
        "strategy": "fedpeft.strategies.build:check",
        "secagg": "fedpeft.strategies.secagg:check",
        "client_dp": "fedpeft.strategies.client_dp:check",
        "continual": "fedpeft.strategies.learning.build:check",
        "privacy": "fedpeft.clients.private:check",
        "tta": "fedpeft.clients.stream:check",
        "atp": "fedpeft.strategies.atp:check",
        "fedthe": "fedpeft.strategies.fedthe:check",
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
