"""Repositories of the Hugging Face hub as inputs: the commit that a name stands for, and its files.

The commit that was taken for a name without one is kept in `<store>/hub` and used again, so that a
branch that moves changes no run until a step is asked to `--update`.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, environment_error
from llava_steps.core.third_party import brief
from llava_steps.settings.hub_id import HubId, parse_dataset, parse_model

FOLDER = "hub"
"""Folder of the store: the commits that were taken, lists of the files that were chosen, and links
to those of datasets. A file for each, because several steps write at the same time."""
Kind = Literal["model", "dataset"]
Choose = Callable[[Sequence[str]], list[str]]
_TEXT = (".json", ".jinja", ".model", ".txt")
_TABLES = (".jsonl", ".json", ".csv", ".tsv")
_ABOUT = re.compile(
    r"(^|/)(\.|readme|license|dataset_infos?\.json|dataset_dict\.json|state\.json)", re.I
)
_SPLIT = re.compile(r"(?<![a-z])(train|test|val|valid|validation|dev|eval)(?![a-z])", re.I)


class Hub:
    """Names of the hub, resolved for one store.

    Args:
        store: the store, whose record says which commits were taken.
        fetch: whether files may be downloaded; otherwise only what was downloaded before is found.
        update: take the newest commit of a name, whatever the record says.
    """

    def __init__(self, store: Path, fetch: bool = True, update: bool = False) -> None:
        self._store, self.fetch, self._update = store, fetch, update
        self.taken: dict[str, str] = {}
        """Commit of each text that was resolved."""

    def model(self, text: str) -> Path:
        """The files of a model that a step may read, in the cache of huggingface_hub.

        Raises:
            InputError: it is not the name of a model, or cannot be downloaded.
        """
        named = parse_model(text)
        if named is None:
            raise InputError(f"{text} is neither a directory nor a hub id; check the name")
        snapshot, _ = self._snapshot(text, named, "model", model_files)
        return snapshot

    def dataset(self, text: str) -> Path:
        """The data files of a dataset, as links in the store.

        Raises:
            InputError: it is not the name of a dataset, cannot be downloaded, or holds no data.
        """
        named = parse_dataset(text)
        if named is None:
            raise InputError(f"{text} does not exist, and is not the name of a dataset on the hub")
        snapshot, files = self._snapshot(
            text, named, "dataset", lambda names: data_files(names, named.inside, text)
        )
        root = self._linked(named, snapshot, files)
        tables = [name for name in files if name.lower().endswith(_TABLES)]
        # A folder says which table is meant only if that is CSV, TSV or JSONL.
        return root / (tables[0] if len(tables) == 1 else named.inside)

    def recorded(self, text: str, named: HubId, kind: Kind) -> str:
        """The commit that was taken for a name before, or its own; else empty."""
        if named.is_pinned:
            return named.revision
        path = self._commit_file(named, kind)
        return path.read_text().strip() if path.is_file() and not self._update else ""

    def _snapshot(
        self, text: str, named: HubId, kind: Kind, choose: Choose
    ) -> tuple[Path, list[str]]:
        """The directory of a commit, and its files that `choose` takes."""
        revision = self.recorded(text, named, kind) or named.revision or "main"
        snapshot, files, error = _cached(named.name, kind, revision), None, None
        if self.fetch:
            try:
                commit, listed = _listed(named.name, kind, revision)
                files = choose(listed)
                snapshot = _download(named.name, kind, commit, files)
            except InputError:
                raise
            except Exception as raised:
                if environment_error(raised) is not None:
                    raise
                if message := _answer(text, named, kind, raised):
                    raise InputError(message) from raised
                error = raised
        if snapshot is None:
            cause = brief(error) if error else "it was never downloaded"
            raise InputError(
                f"{text} is not a directory here and could not be downloaded from the hub: {cause}"
            ) from error
        if self.fetch and not named.is_pinned:
            self._keep(self._commit_file(named, kind), snapshot.name)
        self.taken[text] = snapshot.name
        listing = self._store / FOLDER / f"{_folder(kind, named, snapshot)}.json"
        if files is None:
            return snapshot, self._downloaded(text, kind, snapshot, listing, named.inside, choose)
        known = self._read(listing)
        if known.get(named.inside) != files:
            listing.parent.mkdir(parents=True, exist_ok=True)
            filesystem.write_json(listing, known | {named.inside: files})
        return snapshot, files

    def _downloaded(
        self, text: str, kind: Kind, snapshot: Path, listing: Path, inside: str, choose: Choose
    ) -> list[str]:
        """The files that were chosen when the hub was asked; all of them must be here."""
        files: list[str] | None = self._read(listing).get(inside)
        if files is None and kind == "model":
            # Downloaded by another program, or for another store.
            held = [p.relative_to(snapshot).as_posix() for p in filesystem.files_below(snapshot)]
            files = choose(held)
        if files is None or not all((snapshot / name).is_file() for name in files):
            raise InputError(
                f"{text} was downloaded only in part, and the hub cannot be asked; run the step "
                "again where there is a network"
            )
        return files

    def _linked(self, named: HubId, snapshot: Path, files: Sequence[str]) -> Path:
        """A directory with links to some files of a snapshot, and nothing else."""
        chosen = filesystem.sha256_json(list(files))[:12]
        root = self._store / FOLDER / f"{_folder('dataset', named, snapshot)}-{chosen}"
        for name in files:
            link = root / name
            if not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                # Shares of one work make the same links at the same time.
                own = link.with_name(f"{filesystem.TEMPORARY}{secrets.token_hex(4)}-{link.name}")
                os.symlink((snapshot / name).resolve(), own)
                os.replace(own, link)
        return root

    def _commit_file(self, named: HubId, kind: Kind) -> Path:
        name = quote(f"{named.name}@{named.revision}".rstrip("@"), safe="@")
        return self._store / FOLDER / f"{kind}-{name}.commit"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(
                f"{path} cannot be read: {error}; remove it to ask the hub again"
            ) from error
        return content if isinstance(content, dict) else {}

    def _keep(self, path: Path, commit: str) -> None:
        if not path.is_file() or path.read_text().strip() != commit:
            path.parent.mkdir(parents=True, exist_ok=True)
            filesystem.write_bytes(path, f"{commit}\n".encode())


def is_snapshot(path: Path) -> bool:
    """Whether a directory is a model's snapshot in the cache, which may hold files of others."""
    return path.parent.name == "snapshots" and path.parents[1].name.startswith("models--")


def snapshot_files(path: Path) -> list[Path]:
    """The files of a model's snapshot that a step may read."""
    names = [p.relative_to(path).as_posix() for p in filesystem.files_below(path)]
    return [path / name for name in model_files(names)]


def model_files(names: Iterable[str]) -> list[str]:
    """Configuration, tokenizer and one form of the weights; no copies in other formats."""
    top = sorted(name for name in names if "/" not in name)
    chosen = [name for name in top if name.endswith(_TEXT)]
    chosen += sorted(
        name for name in names if re.fullmatch(r"additional_chat_templates/[^/]+\.jinja", name)
    )
    tensors = [name for name in top if name.endswith(".safetensors")]
    if "model.safetensors" in tensors:
        return [*chosen, "model.safetensors"]
    tensors = [name for name in tensors if not name.startswith(("consolidated", "adapter_"))]
    pickles = [name for name in top if re.fullmatch(r"pytorch_model.*\.bin", name)]
    return chosen + (tensors if "model.safetensors.index.json" in top or not pickles else pickles)


def data_files(names: Iterable[str], inside: str, text: str) -> list[str]:
    """The data files of a dataset below `inside`: those of one form, and of the split `train`.

    Raises:
        InputError: there are none, or it is not clear which are meant.
    """
    plain = sorted(name for name in names if not _ABOUT.search(name))
    folder = inside.rstrip("/") + "/" if inside else ""
    held = [name for name in plain if name == inside or name.startswith(folder)]
    for form in (".parquet", ".tar"):
        if some := [name for name in held if name.lower().endswith(form)]:
            return _one_split(some, inside, text)
    tables = [name for name in held if name.lower().endswith(_TABLES)]
    if not tables:
        raise InputError(
            f"{text} holds no data: none of .parquet, .tar, {', '.join(_TABLES)}; name a folder or "
            "a file of the dataset as org/name@main/path"
        )
    used = _one_split(tables, inside, text)
    # The images of a table that is named lie beside it.
    beside = plain if inside in tables else held
    return sorted({*used, *(name for name in beside if not name.lower().endswith(_TABLES))})


def _one_split(names: list[str], inside: str, text: str) -> list[str]:
    splits = {name: _split(name.removeprefix(inside)) for name in names}
    if len(set(splits.values())) < 2:
        return names
    train = [name for name, split in splits.items() if split == "train"]
    if not train:
        raise InputError(
            f"{text} holds several splits: {', '.join(sorted(set(splits.values())))}; name the "
            f"files of one as org/name@main/path, such as {names[0]}"
        )
    return train


def _split(name: str) -> str:
    parts = _SPLIT.findall(name)
    return parts[-1].lower() if parts else "no split"


def _listed(name: str, kind: Kind, revision: str) -> tuple[str, list[str]]:
    """The commit that a revision stands for, and its files."""
    from huggingface_hub import HfApi

    api = HfApi()
    commit = str(api.repo_info(name, repo_type=kind, revision=revision).sha)
    return commit, api.list_repo_files(name, repo_type=kind, revision=commit)


def _download(name: str, kind: Kind, commit: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [glob.escape(file) for file in files]
    return Path(snapshot_download(name, repo_type=kind, revision=commit, allow_patterns=wanted))


def _cached(name: str, kind: Kind, revision: str) -> Path | None:
    """The directory of a revision that was downloaded before, whole or in part."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind))
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _answer(text: str, named: HubId, kind: Kind, error: Exception) -> str:
    """What the hub said about a name; empty when it could not be asked."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            f"{text} is gated on the hub: accept its terms at its page there, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{text} does not exist here, and the hub has no {kind} {named.name}; check the name, "
            "or run `hf auth login` or set HF_TOKEN if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{text}: the {kind} {named.name} has no revision {named.revision}; check it"
    if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
        return f"{text}: the hub refused: {brief(error)}"
    return ""


def _folder(kind: Kind, named: HubId, snapshot: Path) -> str:
    return f"{kind}--{named.name.replace('/', '--')}-{snapshot.name[:12]}"
