"""The configuration described from its classes: JSON schema, the tables of config/README.md and
docs/reference/settings.md, and that of docs/reference/options.md.

`python -m llava_steps.pipeline.describe` renews the files; a test fails when they have drifted.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from llava_steps.core import filesystem
from llava_steps.settings.config import Config
from llava_steps.settings.explain import sections
from llava_steps.settings.fields import Facts, facts
from llava_steps.settings.former import ELSEWHERE, OPTIONS, field_of
from llava_steps.settings.forms import FIRST_STAGES
from llava_steps.settings.source import STANDALONE
from llava_steps.settings.stage.stage import Stage
from llava_steps.settings.steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / "workflow/schemas/config.schema.json"
README = ROOT / "config/README.md"
SETTINGS_PAGE = ROOT / "docs/reference/settings.md"
OPTIONS_PAGE = ROOT / "docs/reference/options.md"
FILLED = {field for step in STEPS.values() for field in step.feeds}
FILLED |= {f"after_{stage}" for stage in FIRST_STAGES} | {"before", "models"}
NAMED = {"datasets": "each dataset", "stages": "each stage"}
"""Sections that hold a section for each name."""
FORMS = {
    "data": "name, list of names, or name: weight",
    "train": "`all`, `vision_tower`, `projector`, `language_model`, or list of them",
    "sweep": "key: list of values, or list of key: value",
}
"""Values that may be written in several forms."""
STEP_FACTS = {fact.name for fact in fields(Facts)} - {"role", "flag", "bare"}
"""Facts about a field that say nothing about a configuration file."""
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"


def schema() -> str:
    """JSON schema of one file; nothing is required, because a file may be an overlay."""
    described = Config.model_json_schema()
    for part in (described, *described["$defs"].values()):
        part.pop("required", None)
        for field in part.get("properties", {}).values():
            for fact in STEP_FACTS:
                field.pop(fact, None)
    # stage1 and stage2 may be sections too.
    described["properties"] |= {name: {"$ref": "#/$defs/StageSection"} for name in FIRST_STAGES}
    for name in NAMED:
        patterns = described["properties"][name]["patternProperties"]
        for pattern, section in patterns.items():
            patterns[pattern] = {"anyOf": [section, {"type": "null"}]}  # null removes it
    described["properties"][STANDALONE] = {
        "type": "boolean",
        "default": False,
        "description": "true: this file is complete; nothing is taken from files before it",
    }
    described["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    described["title"] = "llava-steps configuration"
    return filesystem.dump_json(described)


def tables() -> str:
    """Markdown: the top-level keys, then one table per section."""
    top = {k: f for k, f in Config.model_fields.items() if k not in {*dict(sections())} - {*NAMED}}
    parts = ["### Top level\n\n" + _table(top, top_level=True)]
    for name, model in sections():
        one = NAMED.get(name)
        title = f"`{name}`: keys of {one}" if one else f"`{name}`"
        text = inspect.cleandoc(model.__doc__ or "")
        parts.append(f"### {title}\n\n{text}\n\n" + _table(model.model_fields))
    return "\n".join(parts)


def _table(fields: dict[str, FieldInfo], top_level: bool = False) -> str:
    rows = ["| key | value | default | what it does |", "|---|---|---|---|"]
    for name, info in fields.items():
        if name == "stage":
            continue
        role = "" if top_level or facts(info).role != "quiet" else " *(quiet)*"
        in_forms = name in FORMS and info.annotation is not str  # not the data of an evaluation
        kind = FORMS[name] if in_forms else _type(info.annotation)
        name = info.alias or name
        default = _default(name, info)
        meaning = (info.description or "").replace("<", "&lt;")
        rows.append(f"| `{name}` | {kind} | {default} | {meaning}{role} |")
    return "\n".join(rows) + "\n"


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in get_args(annotation) if a is not type(None))
    if origin is Literal:
        return ", ".join(
            f"`{filesystem.dump_json(choice).strip()}`" for choice in get_args(annotation)
        )
    if origin is list:
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is dict:
        return f"name: {_type(get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}[annotation]


def _default(name: str, info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    value = info.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if value == "":
        return "filled in" if name in FILLED and facts(info).role == "source" else "empty"
    return f"`{filesystem.dump_json(value, indent=None).strip()}`"


def options_table() -> str:
    """Markdown: a row for each training option of the former scripts."""
    rows = ["| option | key | default | what it does |", "|---|---|---|---|"]
    for option, note in OPTIONS.items():
        name = field_of(option)
        if name is None:
            keys = ", ".join(f"`{key}`" for key in ELSEWHERE[option])
            rows.append(f"| `--{option}` | {keys} | none | {note} |")
            continue
        info = Stage.model_fields[name]
        flags = ", ".join(f"`{f}`" for f in (f"--{option}", facts(info).short) if f)
        key = "" if option == "stage" else f"`{name}`"
        meaning = "; ".join(filter(None, (info.description, note)))
        rows.append(f"| {flags} | {key} | {_default(name, info)} | {meaning} |")
    return "\n".join(rows) + "\n"


def renewed(text: str, made: str) -> str:
    """`text` with what stands between the two markers replaced by `made`."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"a page has lost its markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def pages() -> list[tuple[Path, str]]:
    """Each page that has a generated part, with that part."""
    return [(README, tables()), (SETTINGS_PAGE, tables()), (OPTIONS_PAGE, options_table())]


def main() -> None:
    """Renew the files."""
    filesystem.write_bytes(SCHEMA, schema().encode())
    for page, made in pages():
        filesystem.write_bytes(page, renewed(page.read_text(encoding="utf-8"), made).encode())


if __name__ == "__main__":
    main()
