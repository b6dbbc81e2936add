"""The store: `<store>/<step>/<fingerprint>/` holds the payload and, written last, `manifest.json`.

An entry without a manifest is work in progress; one whose files disagree with its manifest is an
IntegrityError, never a silent rebuild. Bookkeeping of attempts lives in `.work/`, outside the
payload. `publish` shows a sealed entry in `results/<run>/<rule>/`: a copy of the manifest and a
link for each payload file, so that a tool which deletes "the output" deletes a few bytes.

Two digests matter. The fingerprint names the computation (settings, inputs, code, image); the
content digest names its value (payload bytes). Later steps depend on the content digest: the same
value made twice keeps them cached, another value from the same computation does not.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.store import sealed
from llava_steps.store.sealed import SealedFile

MANIFEST = "manifest.json"
WORK = ".work"
READS = "inputs.json"
"""In `WORK`: the entries that the attempt reads, relative to its own."""
CLAIM = f"{filesystem.TEMPORARY}claim"
REMOVED = f"{filesystem.TEMPORARY}removed-"
"""Beginning of the name of an entry that is being removed."""
FORMAT = 1
PACKAGES = (
    "llava-steps",
    "torch",
    "megatron-core",
    "megatron-energon",
    "transformers",
    "tokenizers",
    "safetensors",
    "webdataset",
    "snakemake",
    "pillow",
    "numpy",
)


@dataclass(frozen=True)
class Input:
    """A resolved input: where its bytes are and the digest that stands for them."""

    path: Path
    """Of an artefact the sealed entry itself, never the directory that shows it: another run may
    show another value there at any moment."""
    digest: str
    manifest: Mapping[str, Any] | None = None
    entry: Path | None = None
    """The sealed entry that `path` is or lies in."""
    shown: str = ""
    """The path as it was given."""
    revision: str = ""
    """The commit that a hub id was resolved to."""

    @property
    def described(self) -> dict[str, str]:
        """What a manifest says about it."""
        described = {"path": self.shown, "digest": self.digest}
        return described | ({"revision": self.revision} if self.revision else {})


def fingerprint(
    step: str, config: Mapping[str, Any], inputs: Mapping[str, str], code: str, image: str
) -> str:
    """Name of a computation: 32 hex characters over everything that decides its value."""
    parts = {
        "format": FORMAT,
        "step": step,
        "config": config,
        "inputs": inputs,
        "code": code,
        "image": image,
    }
    return filesystem.sha256_json(parts)[:32]


def content_digest(files: Iterable[Mapping[str, Any]]) -> str:
    """Digest of the payload: names, sizes and sha256 of all files that are not volatile."""
    rows = [[f["path"], f["size"], f["sha256"]] for f in files if not f.get("volatile")]
    return filesystem.sha256_json(sorted(rows))


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a sealed entry or of a published result; None when it is missing."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, IsADirectoryError, NotADirectoryError) as error:
        raise IntegrityError(f"{path} is damaged: {error}") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("content"), str)
        or not isinstance(manifest.get("files"), list)
        or not all({"path", "size", "sha256"} <= file.keys() for file in manifest["files"])
    ):
        raise IntegrityError(f"{path} is not a manifest of format {FORMAT} of llava-steps")
    return manifest


def check(
    directory: Path,
    manifest: Mapping[str, Any],
    sha256: Callable[[Path], str] | None = filesystem.sha256_file,
) -> None:
    """Compare the files of an entry with its manifest: presence, size and sha256.

    With `Digests.file` as `sha256` a file is only read when it may have changed since the last
    time, with None never. Raises IntegrityError that names the first file that differs and says
    what to do.
    """
    advice = (
        f"restore it, or make it again: --force on step {manifest.get('step')}, or "
        "--forcerun with Snakemake"
    )
    if content_digest(manifest["files"]) != manifest["content"]:
        raise IntegrityError(
            f"{directory / MANIFEST}: content digest and file list disagree; {advice}"
        )
    files = [SealedFile(file["path"], file["size"], file["sha256"]) for file in manifest["files"]]
    sealed.verify(directory / MANIFEST, files, advice, sha256)


def seal(
    entry: Path,
    description: Mapping[str, Any],
    volatile: Iterable[str] = (),
    sha256: Callable[[Path], str] = filesystem.sha256_file,
) -> dict[str, Any]:
    """Write the manifest of a finished entry, after its payload is on stable storage.

    `volatile` are glob patterns of files that are verified but not part of the content (timings).
    """
    patterns = tuple(volatile)
    files = []
    for file in sealed.list_files(entry, [WORK, MANIFEST], sha256):
        row: dict[str, Any] = {"path": file.name, "size": file.size, "sha256": file.sha256}
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
            row["volatile"] = True
        files.append(row)
    if not files:
        raise IntegrityError(f"{entry}: the step wrote no file; refusing to seal an empty artefact")
    manifest = {
        "format": FORMAT,
        "content": content_digest(files),
        "files": files,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "packages": package_versions(),
        **description,
    }
    sealed.write_marker(entry / MANIFEST, filesystem.dump_json(manifest).encode())
    return manifest


def package_versions() -> dict[str, str]:
    """Versions of python and of the installed packages that can decide a value."""
    # Late: `--help` and commands that only read the store do not need them.
    import importlib.metadata
    import platform

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def publish(entry: Path, out: Path) -> None:
    """Show a sealed entry at `out`: links to the payload, then a copy of the manifest.

    Only links, empty directories and a manifest are ever removed from `out`; anything else there
    is an InputError, because this step did not write it.
    """
    unpublish(out)
    out.mkdir(parents=True, exist_ok=True)
    for item in _payload(entry):
        _link(item, out / item.name)
    filesystem.write_bytes(out / MANIFEST, (entry / MANIFEST).read_bytes())


def shows(out: Path, entry: Path) -> bool:
    """Whether `out` shows the entry; other files beside it do not count."""
    if (out / MANIFEST).read_bytes() != (entry / MANIFEST).read_bytes():
        return False
    return all((out / item.name).resolve() == item.resolve() for item in _payload(entry))


def removed_name(entry: Path) -> Path:
    """A name for an entry that is being removed: it is no longer taken for a value."""
    return entry.with_name(f"{REMOVED}{entry.name}-{secrets.token_hex(4)}")


def is_held(out: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the entry that `out` shows, damaged or not, is still in its store."""
    return (_entry_behind(out, manifest) / MANIFEST).is_file()


def _entry_behind(out: Path, manifest: Mapping[str, Any]) -> Path:
    """The entry that the links of a result lead to."""
    return (out / Path(manifest["files"][0]["path"]).parts[0]).resolve().parent


@contextlib.contextmanager
def claimed(entry: Path, out: Path) -> Iterator[None]:
    """While it lasts, a temporary link in `out` shows `entry`, sealed or not.

    `clean` removes what nothing shows. It takes the lease of an entry before it looks for links;
    a step that publishes sets the link before it waits for the lease. So one sees the other.
    """
    out.mkdir(parents=True, exist_ok=True)
    claim = out / CLAIM
    claim.unlink(missing_ok=True)
    _link(entry, claim)
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def _payload(entry: Path) -> list[Path]:
    """What `publish` links to, in a fixed order."""
    return [
        item
        for item in sorted(entry.iterdir())
        if item.name not in (MANIFEST, WORK) and not item.name.startswith(filesystem.TEMPORARY)
    ]


def show_work(entry: Path, out: Path) -> None:
    """Show an unfinished entry at `out` as one link, `work`, so that people find its logs."""
    unpublish(out)
    out.mkdir(parents=True, exist_ok=True)
    _link(entry, out / "work")
    (out / CLAIM).unlink(missing_ok=True)  # of this step, or of a killed one


def unpublish(out: Path) -> None:
    """Remove what `publish` or `show_work` put at `out`."""
    if not out.is_dir():
        return
    items = [item for item in out.iterdir() if item.name != CLAIM]
    for item in items:
        temporary = item.name.startswith(filesystem.TEMPORARY)
        if not (item.is_symlink() or item.name == MANIFEST or temporary):
            raise InputError(
                f"{item} was not written by this step; move it away or choose another directory"
            )
    for item in sorted(items, key=lambda p: p.name != MANIFEST):
        filesystem.remove(item)


def _link(target: Path, link: Path) -> None:
    link.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))


def entry_of(directory: Path, manifest: Mapping[str, Any]) -> Path:
    """The sealed entry that `directory`, an entry or a published result, stands for.

    Raises InputError when its links lead to something else than its manifest describes, which is
    so while another run publishes there.
    """
    entry = _entry_behind(directory, manifest)
    if not (entry / MANIFEST).is_file():
        raise IntegrityError(
            f"{directory} shows a value that is no longer in its store; make it again with "
            f"step {manifest.get('step')}"
        )
    sealed_now = read_manifest(entry)
    if sealed_now is None or sealed_now["content"] != manifest["content"]:
        raise InputError(f"{directory} is being changed by another run; wait for it and run again")
    return entry


def artefact_of(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The sealed artefact that `path` is or lies in: (its directory, its manifest), or None.

    A `manifest.json` of another tool further up the tree is ignored.
    """
    for directory in (path, *path.parents):
        if not (directory / MANIFEST).is_file():
            continue
        try:
            manifest = read_manifest(directory)
        except IntegrityError:
            if directory == path:
                raise
            continue
        if manifest is not None:
            return directory, manifest
    return None
