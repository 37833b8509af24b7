"""Tables "name" -> "module:Class". Strings only, so that importing fedpeft imports no method.

Another package adds entries through entry points of the group `fedpeft.<table>`.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import logging
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any

from fedpeft import other_names
from fedpeft.errors import InputError

log = logging.getLogger("fedpeft")
LISTED = 100  # names of a message: all of a table, and the first of 100,000 clients

TABLES: dict[str, dict[str, str]] = {
    "strategies": {
        "fedit": "fedpeft.strategies.rules.fedit:FedIT",
        "ffa_lora": "fedpeft.strategies.rules.ffa_lora:FFALoRA",
        "fedsvd": "fedpeft.strategies.rules.fedsvd:FedSVD",
        "lora_fair": "fedpeft.strategies.rules.lora_fair:LoRAFAIR",
        "flora": "fedpeft.strategies.rules.flora:FLoRA",
        "flexlora": "fedpeft.strategies.rules.flexlora:FlexLoRA",
        "hetlora": "fedpeft.strategies.rules.hetlora:HetLoRA",
        "fedex": "fedpeft.strategies.rules.fedex:FedEx",
        "rolora": "fedpeft.strategies.rules.rolora:RoLoRA",
        "fedsa": "fedpeft.strategies.rules.fedsa:FedSA",
        "fed_sb": "fedpeft.strategies.rules.fed_sb:FedSB",
        "flower": "fedpeft.strategies.rules.flower:FlowerRule",
        "fedprox": "fedpeft.strategies.wrappers.fedprox:FedProx",
        "scaffold": "fedpeft.strategies.wrappers.scaffold:Scaffold",
        "fedadam": "fedpeft.strategies.wrappers.fedopt:FedAdam",
        "fedyogi": "fedpeft.strategies.wrappers.fedopt:FedYogi",
        "fedadagrad": "fedpeft.strategies.wrappers.fedopt:FedAdagrad",
        "atp": "fedpeft.strategies.wrappers.atp:ATP",
        "fedthe": "fedpeft.strategies.wrappers.fedthe:FedTHE",
        "norm_clip": "fedpeft.strategies.wrappers.norm_clip:NormClip",
        "trimmed_mean": "fedpeft.strategies.wrappers.trimmed_mean:TrimmedMean",
        "median": "fedpeft.strategies.wrappers.median:Median",
        "krum": "fedpeft.strategies.wrappers.krum:Krum",
    },
    "objectives": {
        "image-classification": "fedpeft.objectives.image_classification:ImageClassification",
        "sequence-classification": "fedpeft.objectives.sequence_classification:SequenceClassification",
        "causal-lm": "fedpeft.objectives.causal_lm:CausalLM",
        "regression": "fedpeft.objectives.regression:Regression",
        "token-classification": "fedpeft.objectives.token_classification:TokenClassification",
        "multi-label": "fedpeft.objectives.multi_label:MultiLabel",
        "preference": "fedpeft.objectives.preference:Preference",
        "masked-lm": "fedpeft.objectives.masked_lm:MaskedLM",
        "seq2seq": "fedpeft.objectives.seq2seq:Seq2Seq",
    },
    "adapters": {
        "lora": "fedpeft.adapters.lora:Lora",
        "lora_sb": "fedpeft.adapters.lora_sb:LoraSB",
        "peft": "fedpeft.adapters.peft:Peft",
        "paca": "fedpeft.adapters.paca:PaCA",
        "svfit": "fedpeft.adapters.svfit:SVFit",
        "nlora": "fedpeft.adapters.nlora:NLoRA",
        "nola": "fedpeft.adapters.nola:NOLA",
        "sorsa": "fedpeft.adapters.sorsa:SORSA",
        "soma": "fedpeft.adapters.soma:SoMA",
        "bd_lora": "fedpeft.adapters.bd_lora:BDLoRA",
        "ravan": "fedpeft.adapters.ravan:RAVAN",
        "loldu": "fedpeft.adapters.loldu:LoLDU",
        "salt": "fedpeft.adapters.salt:SALT",
        "loca": "fedpeft.adapters.loca:LoCA",
        "orthogonal_adaptation": "fedpeft.adapters.orthogonal_adaptation:OrthogonalAdaptation",
        "bottleneck": "fedpeft.adapters.bottleneck:Bottleneck",
        "hydra": "fedpeft.adapters.hydra:Hydra",
        "difffit": "fedpeft.adapters.difffit:DiffFit",
        "peqa": "fedpeft.adapters.peqa:PEQA",
        "dylora": "fedpeft.adapters.dylora:DyLoRA",
        "shared_private": "fedpeft.adapters.shared_private:SharedPrivate",
    },
    "penalties": {
        "sorsa": "fedpeft.adapters.penalties.sorsa:SORSAPenalty",
        "kasa": "fedpeft.adapters.penalties.kasa:KaSAPenalty",
        "pego": "fedpeft.adapters.penalties.pego:PEGOPenalty",
        "ba_lora": "fedpeft.adapters.penalties.ba_lora:BALoRAPenalty",
    },
    "optimizers": {
        "adamw": "fedpeft.clients.optimizers.adamw:AdamW",
        "sgd": "fedpeft.clients.optimizers.sgd:SGD",
        "lora_plus": "fedpeft.clients.optimizers.lora_plus:LoRAPlus",
        "lora_pro": "fedpeft.clients.optimizers.lora_pro:LoRAPro",
        "riemannian": "fedpeft.clients.optimizers.riemannian:Riemannian",
        "muon": "fedpeft.clients.optimizers.muon:Muon",
        "normuon": "fedpeft.clients.optimizers.normuon:NorMuon",
        "namo": "fedpeft.clients.optimizers.namo:NAMO",
        "namo_d": "fedpeft.clients.optimizers.namo:NAMOD",
        "root": "fedpeft.clients.optimizers.root:ROOT",
        "adamp": "fedpeft.clients.optimizers.adamp:AdamP",
        "sgdp": "fedpeft.clients.optimizers.sgdp:SGDP",
        "schedule_free": "fedpeft.clients.optimizers.schedule_free:ScheduleFree",
        "classp": "fedpeft.clients.optimizers.classp:CLASSP",
        "lora_fa": "fedpeft.clients.optimizers.lora_fa:LoRAFA",
    },
    "datasets": {
        "digits": "fedpeft.data.digits:Digits",
        "docstrings": "fedpeft.data.docstrings:Docstrings",
        "instructions": "fedpeft.data.exercises:Instructions",
        "chats": "fedpeft.data.exercises:Chats",
        "preferences": "fedpeft.data.exercises:Preferences",
        "letters": "fedpeft.data.letters:Letters",
        "docstring-capitals": "fedpeft.data.docstrings:DocstringCapitals",
    },
    "tta": {
        "source": "fedpeft.tta.methods.source:Source",
        "aug_average": "fedpeft.tta.methods.aug_average:AugAverage",
        "em_prior": "fedpeft.tta.methods.em_prior:EMPrior",
        "bn_adapt": "fedpeft.tta.methods.bn_adapt:BNAdapt",
        "rdumb": "fedpeft.tta.methods.rdumb:RDumb",
        "lame": "fedpeft.tta.methods.lame:LAME",
        "tent": "fedpeft.tta.methods.tent:Tent",
        "eata": "fedpeft.tta.methods.eata:EATA",
        "sar": "fedpeft.tta.methods.sar:SAR",
        "rotta": "fedpeft.tta.methods.rotta:RoTTA",
        "memo": "fedpeft.tta.methods.memo:MEMO",
        "t3a": "fedpeft.tta.methods.t3a:T3A",
        "cotta": "fedpeft.tta.methods.cotta:CoTTA",
        "petal": "fedpeft.tta.methods.petal:PETAL",
        "lsa": "fedpeft.tta.methods.lsa:LabelShiftAdapter",
        "itta": "fedpeft.tta.methods.itta:ITTA",
        "roid": "fedpeft.tta.methods.roid:ROID",
        "tlm": "fedpeft.tta.methods.tlm:TLM",
        "ear": "fedpeft.tta.methods.ear:EAR",
        "atp": "fedpeft.tta.methods.atp:TestTimeATP",
        "fedthe": "fedpeft.tta.methods.fedthe:TestTimeFedTHE",
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
        "factor_coso": "fedpeft.strategies.sequence.factor_coso:FederatedFactorCoSO",
        "coso": "fedpeft.strategies.sequence.coso:FederatedCoSO",
        "lae": "fedpeft.strategies.sequence.lae:FederatedLAE",
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
        "records": "fedpeft.continual.streams.records:OwnRecords",
        "wordnet": "fedpeft.continual.streams.wordnet:WordNet",
        "glyphs": "fedpeft.continual.streams.glyphs:Glyphs",
    },
    "mergers": {
        "running_average": "fedpeft.merging.methods.running_average:RunningAverage",
        "task_arithmetic": "fedpeft.merging.methods.task_arithmetic:TaskArithmetic",
        "metrics_weighted": "fedpeft.merging.methods.metrics_weighted:MetricsWeighted",
        "opcm": "fedpeft.merging.methods.opcm:OPCM",
        "orthogonal_adaptation": "fedpeft.merging.methods.orthogonal_adaptation:OrthogonalAdaptation",
        "lora_lego": "fedpeft.merging.methods.lora_lego:LoRALego",
        "reversible": "fedpeft.merging.methods.reversible:Reversible",
        "lora_squeeze": "fedpeft.merging.methods.lora_squeeze:LoRASqueeze",
    },
    "unlearning": {
        "loku": "fedpeft.unlearning.methods.loku:LoKU",
        "negation": "fedpeft.unlearning.methods.negation:Negation",
        "retrain": "fedpeft.unlearning.methods.retrain:Retrain",
    },
    "checks": {
        "quantization": "fedpeft.models.quantized:check",  # the first: it completes the config
        "peft": "fedpeft.adapters.peft_types:check",
        "strategy": "fedpeft.strategies.build:check",
        "secagg": "fedpeft.strategies.secagg.terms:check",
        "client_dp": "fedpeft.strategies.wrappers.client_dp:check",
        "continual": "fedpeft.strategies.sequence.build:check",
        "privacy": "fedpeft.clients.guard:check",
        "metric": "fedpeft.objectives.base:check",
        "trackers": "fedpeft.record.trackers.base:check",
        "tta": "fedpeft.clients.test_time:check",
        "client_half": "fedpeft.strategies.client:check",
        "training": "fedpeft.clients.training_checks:check",
        "fedthe": "fedpeft.strategies.wrappers.fedthe:check",
        "wording": "fedpeft.data.wording:check",
        "best": "fedpeft.run.best:check",
        "traffic": "fedpeft.run.traffic:check",
    },
    "trackers": {
        "tensorboard": "fedpeft.record.trackers.tensorboard:TensorBoardTracker",
        "wandb": "fedpeft.record.trackers.wandb:WandbTracker",
        "mlflow": "fedpeft.record.trackers.mlflow:MLflowTracker",
    },
    "partitioners": {
        "iid": "fedpeft.data.partition:IID",
        "dirichlet": "fedpeft.data.partition:Dirichlet",
        "column": "fedpeft.data.partition:Column",
        "shards": "fedpeft.data.partition:Shards",
        "quantity": "fedpeft.data.partition:Quantity",
    },
}

EMBEDDED = {
    "tiny-vit": "image-classification",
    "tiny-bert": "sequence-classification",
    "tiny-llama": "causal-lm",
    "tiny-t5": "seq2seq",
}


@cache
def entries_of_others() -> dict[str, EntryPoints]:
    """Entry points of other packages by group. Every installed package may have a file of them: they are read once."""
    points = entry_points()
    return {group: points.select(group=group) for group in points.groups if group.startswith("fedpeft.")}


@cache
def table(kind: str) -> dict[str, str]:
    """All entries of one table, other packages' entry points included."""
    found = {point.name: point.value for point in entries_of_others().get(f"fedpeft.{kind}", ())}
    for name in found.keys() & TABLES[kind].keys():
        log.warning(
            "%s = %s (entry point of fedpeft.%s) is not used: fedpeft has %s itself. Give it another name.",
            *(name, found[name], kind, name),
        )
    # Ours last, so that no other package can take the place of one of them.
    return {**found, **TABLES[kind]}


def names(kind: str) -> list[str]:
    """All names of a table, other packages' among them, first."""
    return list(table(kind))


def is_extended() -> bool:
    """Whether another package has added entries."""
    return bool(entries_of_others())


def load(kind: str, name: str, key: str | None = None) -> Any:
    """The object registered as `name`; `key` is the config key to blame when there is none."""
    entries = table(kind)
    if name not in entries:
        raise InputError(unknown(key or kind, name, entries))
    module, _, attribute = entries[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def summary(kind: str, name: str) -> str:
    """The first line of an entry's docstring, read from its file, so that a list of names imports no method."""
    module, _, attribute = table(kind)[name].partition(":")
    spec = importlib.util.find_spec(module)
    nodes = [] if spec is None or spec.origin is None else ast.parse(Path(spec.origin).read_text()).body
    named = [item for item in nodes if isinstance(item, ast.ClassDef | ast.FunctionDef)]
    node = next((item for item in named if item.name == attribute), None)
    text = inspect.getdoc(load(kind, name)) if node is None else ast.get_docstring(node)
    return (text or "").partition("\n")[0]


def unknown(key: str, given: object, allowed: Iterable[str]) -> str:
    """The message for a name that is not allowed: key, what was given, what is allowed, the nearest.

    >>> print(unknown("strategy.name", "fedsdv", ["fedit", "fedsvd"]))
    strategy.name: 'fedsdv' is not known. Did you mean 'fedsvd'? Allowed: fedit, fedsvd.
    """
    allowed = list(allowed)
    near = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else ""
    better = other_names.why_refused(key, str(given)) or other_names.value(str(given), allowed)
    hint = f" {better or hint}".rstrip()
    more = f" and {len(allowed) - LISTED:,} more" if len(allowed) > LISTED else ""
    return f"{key}: '{given}' is not known.{hint} Allowed: {', '.join(allowed[:LISTED])}{more}."
