"""A model directory from which lmms-eval writes the prompts that the model was trained on.

Its `llava_hf` model differs from apply_chat_template with an export in two ways:

* It passes each content as a list of parts. A template that takes a text, as those of most language
  models do, fails on that.
* It tokenizes the rendered text as plain text, so a tokenizer that begins every text with <s> puts
  a second one before that of the template.

Both are fixed in the template: a directory of links to the model's files, with a few lines of Jinja
before its template. The resulting prompts are compared with the model's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.sample import PLACEHOLDER
from llava_steps.data.samples.template import message_parts, takes_parts

TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"
WITHOUT_BOS = "{%- set bos_token = '' %}"
TEXT_OF_PARTS = """\
{%- set plain = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set plain.text = message['content'] -%}
{%- else -%}
{%- set plain.text = '' -%}
{%- for part in message['content'] -%}
{%- set plain.text = plain.text + (IMAGE if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- set plain.messages = plain.messages + [{'role': message['role'], 'content': plain.text}] -%}
{%- endfor -%}
{%- set messages = plain.messages %}"""
END = "{{- '' }}"
"""Follows the lines, to keep white space at the beginning of the template itself."""


def directory(model: Path, parent: Path) -> Path:
    """`model`, or a new directory in `parent` that differs from it in the chat template.

    Raises:
        InputError, ConfigError: as `ask.Model`.
        ConfigError: the prompts would differ from those of the model.
    """
    from llava_steps.data.samples.processor import load_processor
    from llava_steps.evaluation import ask

    ask.check_llava(model)
    processor = load_processor(model)
    as_parts = takes_parts(processor)
    wanted = _ids(processor, _own(processor, as_parts), special=not _begins(processor, as_parts))
    lines = "" if as_parts else TEXT_OF_PARTS.replace(
        "IMAGE", json.dumps(processor.image_token + "\n")
    )  # fmt: skip
    if wanted != _ids(processor, _own(processor, as_parts)):
        lines = WITHOUT_BOS + lines
    if lines:
        processor.chat_template = lines + END + processor.chat_template
        model = _linked(model, parent / model.name, processor.chat_template)
    if _ids(processor, _own(processor, as_parts=True)) != wanted:
        raise ConfigError(
            f"{model}: the prompts of lmms-eval would differ from the chat template; give one that "
            "takes {'type': 'image'} parts"
        )
    return model


def _own(processor: Any, as_parts: bool) -> str:
    """The prompt of two turns, the first with an image, its content as parts or as text."""
    conversation = [("user", f"{PLACEHOLDER}\nA?"), ("assistant", "B."), ("user", "C?")]
    turns = []
    for role, text in conversation:
        content: Any = text.replace(PLACEHOLDER, processor.image_token)
        turns.append({"role": role, "content": message_parts(text) if as_parts else content})
    prompt: str = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return prompt


def _begins(processor: Any, as_parts: bool) -> bool:
    """Whether the template writes the beginning token itself."""
    bos = processor.tokenizer.bos_token
    return bool(bos) and _own(processor, as_parts).startswith(bos)


def _ids(processor: Any, text: str, special: bool = True) -> list[int]:
    ids: list[int] = processor.tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def _linked(model: Path, directory: Path, template: str) -> Path:
    """`directory` with links to the files of `model`, and another chat template."""
    filesystem.remove(directory)
    directory.mkdir(parents=True)
    for path in model.iterdir():
        if path.name not in (TEMPLATE, OLDER_TEMPLATE) and not path.name.startswith("."):
            (directory / path.name).symlink_to(path.absolute())
    filesystem.write_bytes(directory / TEMPLATE, template.encode())
    if (model / OLDER_TEMPLATE).exists():
        filesystem.write_json(directory / OLDER_TEMPLATE, {"chat_template": template})
    return directory
