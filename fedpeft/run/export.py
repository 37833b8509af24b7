"""The adapter of a run as a folder that others can use, or merged into its base model."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedpeft import config as configs
from fedpeft import folders, registry
from fedpeft.adapters import folder, placed_folder
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.config import Config
from fedpeft.errors import InputError, RunError
from fedpeft.files import read_object, write_bytes
from fedpeft.models import loading
from fedpeft.models.base import Base
from fedpeft.record import checkpoint
from fedpeft.run import card, companions, identity
from fedpeft.run.best import Best
from fedpeft.run.card import Exported, shareable_name
from fedpeft.state import AdapterState
from fedpeft.strategies.build import build
from fedpeft.strategies.parts.ranks import prefix

log = logging.getLogger("fedpeft")


def export(
    run: str | Path,
    to: str | Path,
    merge: bool = False,
    best: bool = False,
    round: int | None = None,
    base: str | None = None,
    license: str | None = None,
    rank: int | None = None,
) -> dict[str, Any]:
    """Write a folder that others can use: adapter or merged model, tokenizer or processor with template, model card.

    Nothing in it says where on this machine anything lies, or who the clients are; their own adapters stay in the run.

    Args:
        to: the folder, new or empty.
        merge: the whole model, in place of the adapter.
        best: the state that `run.best` has kept, in place of the last one.
        round: likewise that of a checkpoint which is still there.
        base: what others call the base model; None is the config's name for it, of a local folder its own name.
        license: of the result, for its card.
        rank: the first so many ranks of an adapter whose ranks are nested, in place of all.

    Raises:
        InputError: `run` has no finished adapter, its base has become another model, or `to` is not empty.
        RunError: the model cannot be written.
    """
    run, to = folders.run_folder(run), Path(to)
    _require_flags({"merge": merge, "best": best}, {"--base": base, "--license": license})
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise InputError(f"{run}: no adapter/adapter_config.json; is it a run folder, and has the run finished?")
    config, names = configs.load(run / "resolved.yaml"), label_names(run / "split.json")
    with (
        folders.filled(to, "--to") as draft,
        _choose_adapter(run, config, best, round) as (whole, number),
        _cut_ranks(whole, config, rank) as source,
    ):
        merge_folder = read_mergeable(source) if merge else None  # before the base: not every adapter merges
        loaded = _load_base(run, config, names, needed=merge)
        exported = Exported(
            run,
            config,
            shareable_name(config.model.name, config.model.name in registry.EMBEDDED) if base is None else base,
            number,
            merge,
            bool(folder.about(source)["pooled_head"]),
            names,
            loaded is not None and loaded.processor is not None,
            license,
            rank,
        )
        form = (read_object(run / "summary.json").get("texts") or {}).get("form")
        settings = None if loaded is None else companions.write_processor(draft, loaded, config, form)
        if merge_folder is not None and loaded is not None:
            merge_folder(loaded)
            _write_merged(exported, loaded, source, settings, draft, to)
        else:
            _copy_adapter(source, draft, exported.base)
        _say_quantization(exported)
        write_bytes(draft / card.NAME, card.write(exported).encode())
        return {"model" if merge else "adapter": str(to), "notes": _notes_on(exported, loaded)}


def _require_flags(chosen: dict[str, Any], texts: dict[str, str | None]) -> None:
    for flag, value in chosen.items():
        if not isinstance(value, bool):
            raise InputError(f"{flag}={value!r}: give True or False.")
    for flag, text in texts.items():
        if text is not None and not (text.strip() and text.isprintable()):
            raise InputError(f"{flag} {text!r}: no name. Leave it out, or give one line of text.")


def _load_base(run: Path, config: Config, names: list[str], needed: bool) -> Base | None:
    """The base model of the run; None where it is not on this machine and not needed, which is said."""
    try:
        base = loading.load(config.model, len(names), config.run.seed)
    except InputError as error:
        if needed:
            raise
        log.warning(
            "the base model cannot be loaded here, so whether it is the one of the run is not known, and the folder "
            "gets no tokenizer: %s",
            error,
        )
        return None
    identity.hold(run, {"base model": identity.of_base(base, config)}, config)
    return base


def _copy_adapter(source: Path, draft: Path, base: str) -> None:
    """The files of the shared adapter, its base under the name that others know."""
    for name in (folder.WEIGHTS, folder.HEAD):
        if (source / name).exists():
            shutil.copy2(source / name, draft / name)
    about = read_object(source / "adapter_config.json")
    about["base_model_name_or_path"] = base
    write_bytes(draft / "adapter_config.json", (json.dumps(about, indent=2) + "\n").encode())


def _write_merged(exported: Exported, base: Base, source: Path, settings: Any, draft: Path, to: Path) -> None:
    if settings is not None:
        base.backbone.generation_config = settings
    try:
        _save_merged(base, exported.names, draft)
    except SafetensorError as error:  # its writer has no OSError
        raise RunError(f"{to}: the model could not be written: {error}.") from error
    if (source / folder.HEAD).exists():
        shutil.copy2(source / folder.HEAD, draft / folder.HEAD)
    if exported.pooled:
        weight, bias = (base.head.get_parameter(name) for name in ("weight", "bias"))
        companions.write_pooled_head(draft, weight, bias, exported.config.model.max_length)


def _say_quantization(exported: Exported) -> None:
    section = exported.config.model
    if section.quantization is not None and exported.merged:
        log.warning(
            "the base was kept as %s: the adapter is merged into its dequantised weights, which is what it was trained "
            "over, and the model that is saved is in %s",
            section.quantization,
            section.dtype,
        )
    elif section.quantization is not None:
        log.warning(
            "the adapter was trained over a base that bitsandbytes kept as %s: load it so for the same answers "
            "(docs/commands.md has the lines)",
            section.quantization,
        )


def _notes_on(exported: Exported, base: Base | None) -> list[str]:
    """What whoever hands the folder on should know."""
    notes = []
    if base is None:
        notes.append("it has no tokenizer, as the base model is not on this machine")
    if not exported.merged and exported.own_lines is not None:
        notes.append(
            f"stock peft has no {exported.config.adapter.name}: README.md has the lines that load the folder, and "
            "`fedpeft predict` opens it"
        )
    if exported.pooled and exported.merged:
        notes.append(
            "its head is fedpeft's mean-pooled one: sentence-transformers loads it whole, README.md has ten lines that "
            "do it with transformers alone, and a text-classification pipeline would draw a random head in its place"
        )
    elif exported.pooled:
        notes.append(
            "its head is fedpeft's mean-pooled one, in head.safetensors, which peft does not load: README.md has ten "
            "lines that do; --merge writes a folder that sentence-transformers loads whole"
        )
    if (exported.run / "adapter" / "clients").is_dir():
        notes.append(
            f"each client has a model of its own; this is what they share, and theirs stay in "
            f"{exported.run / 'adapter' / 'clients'}"
        )
    if not exported.merged and exported.base in registry.EMBEDDED:
        notes.append(f"only fedpeft has the base model {exported.base}; --merge writes a whole model for all others")
    elif (
        not exported.merged
        and exported.base == shareable_name(exported.config.model.name) != exported.config.model.name
    ):
        notes.append(
            f"the base model, a folder of this machine, is called '{exported.base}' in it; --base NAME says where "
            "others get it"
        )
    return notes


@contextmanager
def _choose_adapter(run: Path, config: Config, best: bool, number: int | None) -> Iterator[tuple[Path, int]]:
    """The adapter folder that is meant and its round, made of a checkpoint where it is not the last one's."""
    if not best and number is None:
        yield run / "adapter", int(read_object(run / "summary.json").get("rounds") or 0)
        return
    state = checkpoint.read(_find_state(run, config, best, number))
    strategy = build(config, len(label_names(run / "split.json")))
    if strategy.keeps:
        raise InputError(
            f"--round {number}: with strategy.name={config.strategy.name} clients keep "
            f"{', '.join(strategy.keeps)}, and no checkpoint holds these. Leave --round out: the last round has an "
            "adapter of each client."
        )
    with tempfile.TemporaryDirectory() as made:
        # In the form that a next round would send, as the run's own folder is.
        adapter = flatten_adapter(strategy.before_round(state).adapter)
        about = folder.about(run / "adapter")
        if any(layer.kind not in ("lora", "head") for layer in adapter.sites.values()):
            about["settings"] = folder.settings_of(run / "adapter")
        folder.save(adapter, Path(made), **about)
        yield Path(made), state.round


@contextmanager
def _cut_ranks(source: Path, config: Config, rank: int | None) -> Iterator[Path]:
    """The adapter folder, or one of the first ranks of it."""
    if rank is None:
        yield source
        return
    nested = [name for name in registry.names("adapters") if getattr(registry.load("adapters", name), "nested", False)]
    if config.adapter.name not in nested:
        raise InputError(
            f"--rank {rank}: the first ranks of adapter.name={config.adapter.name} alone are no adapter; those of "
            f"{', '.join(nested)} are. `fedpeft merge --method lora_squeeze rank={rank} --out NEW_FOLDER {source}` "
            "finds the best adapter of that rank."
        )
    adapter = folder.load(source)
    highest = max(map(adapter.rank, adapter.lora_sites()))
    # From Python anything comes, and True would be rank 1.
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(highest, config.adapter.r):
        raise InputError(f"--rank {rank}: the adapter has ranks 1 to {config.adapter.r}.")
    if highest > config.adapter.r:
        raise InputError(
            f"--rank {rank}: strategy {config.strategy.name} has moved the base weights, which the adapter folder has "
            "as further ranks; the first ones alone are not what was trained. Leave --rank out."
        )
    with tempfile.TemporaryDirectory() as made:
        folder.save(prefix(adapter, rank), Path(made), **folder.about(source))
        yield Path(made)


def _find_state(run: Path, config: Config, best: bool, round_number: int | None) -> Path:
    if best and round_number is not None:
        raise InputError(f"--best and --round {round_number}: give one of them.")
    parent, number = run / "checkpoints", round_number
    if best:
        found = Best.open(config, run)
        if found is None:
            raise InputError(f"{run}: --best: the run had no run.best to choose by, so none was kept.")
        parent, number = found.folder, found.find_round(config.run.rounds)
    states = checkpoint.of_round(parent, number or 0)
    if not states:
        there = ", ".join(map(str, checkpoint.rounds(parent))) or "none"
        raise InputError(
            f"{run}: {'--best' if best else f'--round {number}'}: no state of that round is kept in {parent}; there "
            f"are: {there}. run.keep_checkpoints says how many checkpoints stay."
        )
    return states[-1]


def _save_merged(base: Base, names: list[str], to: Path) -> None:
    merged: Any = base.backbone
    if base.objective.headed:
        merged.config.id2label = dict(enumerate(names))
        merged.config.label2id = {name: index for index, name in enumerate(names)}
    merged.save_pretrained(to)


def label_names(path: Path) -> list[str]:
    """The classes of a run, in the order of its head's outputs."""
    try:
        return [str(name) for name in json.loads(path.read_text())["histogram"]["labels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot read the run's label names: {error!r}") from error


def read_mergeable(source: Path) -> Callable[[Base], None]:
    """What writes the adapter of a folder into the weights of its base.

    Raises:
        InputError: it is no other weights.
    """
    section = placed_folder.read_section(source)
    if section is not None and placed_folder.is_affine(section):
        return lambda base: placed_folder.merge_into(base, source, section)
    adapter = folder.load(source)

    def merge_factors(base: Base) -> None:
        base.make_dense()
        merge_into(base, adapter)

    return merge_factors


@torch.no_grad()
def merge_into(base: Base, adapter: AdapterState) -> None:
    """W <- W + s B A at every site, heads replaced."""
    for site in adapter.lora_sites():
        change = adapter.sites[site].scaling * (adapter[f"{site}/B"].double() @ adapter[f"{site}/A"].double())
        weight = base.weight(site)
        # Rounded once: in bfloat16 a small change would be lost to the rounding of each term.
        weight.copy_((weight.double() + change).to(weight.dtype))
    for key, value in adapter.tensors.items():
        if adapter.role(key) == "head":
            path, _, role = key.rpartition("/")
            name, _, rest = path.partition(".")
            module = base.heads[name].get_submodule(rest) if rest else base.heads[name]
            getattr(module, role).copy_(value)
