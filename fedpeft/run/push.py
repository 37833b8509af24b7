"""An exported folder handed to the Hugging Face hub by huggingface_hub; without `sure` only said what would be sent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedpeft.errors import InputError, RunError
from fedpeft.foreign import shown
from fedpeft.run import card
from fedpeft.run.export import export

WHOLE, ADAPTER = "config.json", "adapter_config.json"
LONGEST = 500  # bytes of what a hub says


def push(path: Path, repo: str, private: bool = False, sure: bool = False) -> dict[str, Any]:
    """Send a run's exported adapter, or a folder that `export` has written, to a repo of the hub.

    Args:
        path: the run, or the folder.
        repo: NAME of the user's, or OWNER/NAME; made where it is not there.
        private: a new repo is seen by its owner alone.
        sure: send it; else nothing leaves this machine.

    Returns:
        `repo`, `private`, `files` (`path`, `bytes`), `bytes`, `card`, `notes`, and `sent`; once sent also `url`.

    Raises:
        InputError: `repo` is no name, `path` is neither, the run is not finished, there is no token, or the machine is
            told to stay offline.
        RunError: the hub refuses it, cannot be reached, or has the repo in public where `private` is asked for.
    """
    _require_name(repo)
    if sure:
        _require_connection()
    with _open_folder(path) as (folder, notes):
        paths, hidden = _find_files(folder)
        if hidden:
            notes = [*notes, f"hidden files and links are not sent, as {hidden[0]} ({len(hidden)} in all)"]
        files: list[dict[str, Any]] = [{"path": path, "bytes": (folder / path).stat().st_size} for path in paths]
        result = {
            "sent": sure,
            "repo": repo,
            "private": private,
            "files": files,
            "bytes": sum(file["bytes"] for file in files),
            "notes": notes,
            "card": (folder / card.NAME).read_text(encoding="utf-8"),
        }
        return {**result, **_send_folder(folder, paths, repo, private)} if sure else result


def _find_files(folder: Path) -> tuple[list[str], list[str]]:
    """What is sent, and what is not since no export writes it: what is hidden, and links."""
    found: dict[bool, list[str]] = {False: [], True: []}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink() or not path.is_dir():
            found[path.is_symlink() or any(part.startswith(".") for part in name.parts)].append(str(name))
    return found[False], found[True]


@contextmanager
def _open_folder(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folder to send, made of a run where it is one, and what is to be known of it."""
    if (path / card.NAME).is_file() and ((path / ADAPTER).is_file() or (path / WHOLE).is_file()):
        yield path, []
    elif not (path / "resolved.yaml").is_file():
        raise InputError(f"{path}: neither a run folder nor a folder that `fedpeft export` has written.")
    else:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "exported"
            yield folder, export(path, folder)["notes"]


def _require_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(
            f"REPO {repo!r}: no name of a repo. Give OWNER/NAME, as ada/letters-lora. ({error})"
        ) from error


def _require_connection() -> None:
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        raise InputError("--yes: HF_HUB_OFFLINE is set, so nothing can be sent. Unset it, or leave --yes out.")
    if get_token() is None:
        raise InputError(
            "--yes: there is no token of the hub. Run `hf auth login`, or set HF_TOKEN to a token that may write."
        )


def _send_folder(folder: Path, paths: list[str], repo: str, private: bool) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    name = None
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        # `exist_ok` takes a repo as it is, and a public one stays public.
        if private and not api.repo_info(name).private:
            raise RunError(
                f"{name} is there already and public, so --private cannot hold, and nothing was sent. Make it private "
                "on the hub, or name a new repo."
            )
        done = api.create_commit(
            repo_id=name,
            operations=[CommitOperationAdd(path, folder / path) for path in paths],
            commit_message="Written by fedpeft export",
        )
    except RunError:
        raise
    except Exception as error:  # huggingface_hub, httpx and hf_xet raise errors of many kinds
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, KeyError | TypeError | AttributeError):
            why = f"its answer makes no sense ({type(error).__name__}: {why})"
        # An answer that is lost may be that of a commit which was made.
        made = "" if name is None else f" The repo {name} is there; see what it holds."
        raise RunError(f"{repo}: the hub has not taken it: {shown(why, LONGEST)}.{made}") from error
    return {"repo": name, "url": str(done.repo_url), "commit": done.oid}
