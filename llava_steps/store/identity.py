"""What a computation is known by: its settings, its inputs' contents, its code and its image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.settings import paths
from llava_steps.settings.blend import read_blend
from llava_steps.settings.fields import facts, flag_name, values
from llava_steps.store import store
from llava_steps.store.code_version import code_version
from llava_steps.store.digest import Digests
from llava_steps.store.hub import Hub, is_snapshot, snapshot_files
from llava_steps.store.step import C, Step
from llava_steps.store.store import Input


class Identity(NamedTuple):
    """What a computation is known by."""

    name: str
    settings: dict[str, Any]
    inputs: dict[str, Input]
    code: str
    fingerprint: str


def identify(
    step: Step[C],
    module: str,
    config: C,
    digests: Digests,
    image: str = "",
    recorded: Mapping[str, Mapping[str, str]] | None = None,
    update: bool = False,
) -> Identity:
    """The name of a computation; every input that is a result is compared with its manifest.

    With `recorded`, the inputs that the shown value was made from, this only plans: a file of the
    user that is gone since counts as unchanged, and so does what a hub id named; nothing is fetched
    and the bytes of results are taken to be what their manifests say. The step itself reads them
    before it uses them.

    `update` takes the newest commit of hub ids instead of the one that was taken before.

    Raises:
        InputError, ConfigError: an input is missing or was not given.
        IntegrityError: an input disagrees with its manifest.
    """
    hub = Hub(digests.store, fetch=recorded is None, update=update)
    inputs = _inputs(step, config, digests, recorded, hub)
    name = step.named(config)
    slice_ = values(config)
    code = code_version(module)
    contents = {key: item.digest for key, item in inputs.items()}
    return Identity(
        name, slice_, inputs, code, store.fingerprint(name, slice_, contents, code, image)
    )


def _inputs(
    step: Step[C],
    config: C,
    digests: Digests,
    recorded: Mapping[str, Mapping[str, str]] | None,
    hub: Hub,
) -> dict[str, Input]:
    """Every input that is given, compared with its manifest and pinned to its sealed entry."""
    inputs: dict[str, Input] = {}
    for given in paths.given(config):
        key, name, info, text = given.key, given.field, given.info, given.text
        if not text:
            if facts(info).optional:
                continue
            raise ConfigError(f"{flag_name(name, info)} is needed: {info.description}")
        named = name in step.resolve and not Path(text).exists()
        if recorded is not None and not Path(text).exists():
            known = digests.of_name(text) if named else None
            if recorded.get(key, {}).get("path") == text:
                known = known or recorded[key]["digest"]
            if known is not None:
                inputs[key] = Input(Path(text), known, shown=text)
                continue
        path = step.resolve[name](text, hub) if name in step.resolve else Path(text)
        missing = InputError(f"{flag_name(name, info)}: {path} does not exist")
        artefact = store.artefact_of(path)
        # A result does not show what lies beside its payload, such as kept checkpoints.
        is_beside = artefact is not None and store.WORK in path.relative_to(artefact[0]).parts
        if not (path.exists() or is_beside):
            raise missing
        if artefact is not None:
            directory, manifest = artefact
            entry = store.entry_of(directory, manifest)
            store.check(entry, manifest, digests.file if recorded is None else None)
            inside = path.relative_to(directory).as_posix()
            if not (entry / inside).exists():
                raise missing
            digest = manifest["content"] if inside == "." else f"{manifest['content']}/{inside}"
            if named_files := _named_by(info, entry / inside, digests):
                digest = filesystem.sha256_json([digest, named_files])
            inputs[key] = Input(entry / inside, digest, manifest, entry, text)
        else:
            digest = _digest(step, config, name, path, digests)
            if named:
                digests.keep_name(text, digest)
            inputs[key] = Input(path, digest, shown=text, revision=hub.taken.get(text, ""))
    digests.save()
    return inputs


def _digest(step: Step[C], config: C, key: str, path: Path, digests: Digests) -> str:
    if key in step.parts:
        return digests.files(*step.parts[key](path, config))
    if named := _named_by(step.config.model_fields[key], path, digests):
        return filesystem.sha256_json([digests.file(path), named])
    if is_snapshot(path):
        return digests.files(path, snapshot_files(path))
    return digests.path(path)


def _named_by(field: FieldInfo, path: Path, digests: Digests) -> list[str]:
    """Digests of what the file of a blend names, which counts as its content."""
    if not facts(field).is_blend or not path.is_file():
        return []
    return [_member_digest(member, digests) for member in read_blend(path, "train").files]


def _member_digest(path: Path, digests: Digests) -> str:
    artefact = store.artefact_of(path)
    if artefact is None or artefact[0] != path:
        return digests.path(path)
    directory, manifest = artefact
    store.check(store.entry_of(directory, manifest), manifest, digests.file)
    return str(manifest["content"])


def changed_input(
    step: Step[C], config: C, inputs: Mapping[str, Input], digests: Digests
) -> Path | None:
    """The first file of the user that is not what it was when `inputs` were read, if any.

    Raises:
        IntegrityError: an input from the store disagrees with its manifest.
    """
    for key, item in inputs.items():
        if item.entry is not None and item.manifest is not None:
            store.check(item.entry, item.manifest, digests.file)
        elif _digest(step, config, key.partition(".")[0], item.path, digests) != item.digest:
            return item.path
    return None
