"""A model directory from which lmms-eval writes the prompts that the model was trained on.

Two things part its `llava_hf` from what apply_chat_template does with an export:

* It hands over each content as a list of parts. A template that takes a text, as those of most
  language models do, fails on that.
* It tokenizes the rendered text as a plain one, so that a tokenizer that begins every text with <s>
  puts a second one before the template's own.

Both are mended in the template alone: a directory of links to the model's files, with a few lines
of Jinja before its template. What comes out is compared with the model's own prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError

TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"
WITHOUT_BOS = "{%- set bos_token = '' %}"
TEXT_OF_PARTS = """\
{%- set told = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set told.text = message['content'] -%}
{%- else -%}
{%- set told.text = '' -%}
{%- for part in message['content'] -%}
{%- set told.text = told.text + (IMAGE if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{%- set told.messages = told.messages + [{'role': message['role'], 'content': told.text}] -%}
{%- endfor -%}
{%- set messages = told.messages %}"""
END = "{{- '' }}"
"""Behind the lines, so that white space with which the template itself begins stays."""


def directory(model: Path, room: Path) -> Path:
    """`model`, or a directory made in `room` that differs from it in the chat template.

    Raises:
        InputError, ConfigError: as `ask.Model`.
        ConfigError: the prompts would not be the model's own.
    """
    from transformers import AutoProcessor

    from llava_steps.evaluation import ask

    ask.check_llava(model)
    processor = AutoProcessor.from_pretrained(model, backend="pil", local_files_only=True)
    as_parts = ask.takes_parts(processor, model)
    wanted = _ids(processor, _own(processor, as_parts), special=not _begins(processor, as_parts))
    lines = "" if as_parts else TEXT_OF_PARTS.replace(
        "IMAGE", json.dumps(processor.image_token + "\n")
    )  # fmt: skip
    if wanted != _ids(processor, _own(processor, as_parts)):
        lines = WITHOUT_BOS + lines
    if lines:
        processor.chat_template = lines + END + processor.chat_template
        model = _linked(model, room / model.name, processor.chat_template)
    if _ids(processor, _own(processor, as_parts=True)) != wanted:
        raise ConfigError(
            f"{model}: lmms-eval would not ask in the words of the chat template; give one that "
            "takes {'type': 'image'} parts"
        )
    return model


def _own(processor: Any, as_parts: bool) -> str:
    """The prompt of two turns, the first with an image, its content as parts or as text."""
    from llava_steps.evaluation import ask

    said = [("user", f"{ask.PLACEHOLDER}\nA?"), ("assistant", "B."), ("user", "C?")]
    turns = []
    for role, text in said:
        content: Any = text.replace(ask.PLACEHOLDER, processor.image_token)
        turns.append({"role": role, "content": ask.content_parts(text) if as_parts else content})
    prompt: str = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return prompt


def _begins(processor: Any, as_parts: bool) -> bool:
    """Whether the template writes the beginning token itself."""
    bos = processor.tokenizer.bos_token
    return bool(bos) and _own(processor, as_parts).startswith(bos)


def _ids(processor: Any, text: str, special: bool = True) -> list[int]:
    found: list[int] = processor.tokenizer(text, add_special_tokens=special)["input_ids"]
    return found


def _linked(model: Path, place: Path, template: str) -> Path:
    """`place` with links to the files of `model`, and another chat template."""
    filesystem.remove(place)
    place.mkdir(parents=True)
    for path in model.iterdir():
        if path.name not in (TEMPLATE, OLDER_TEMPLATE) and not path.name.startswith("."):
            (place / path.name).symlink_to(path.absolute())
    filesystem.write_bytes(place / TEMPLATE, template.encode())
    if (model / OLDER_TEMPLATE).exists():
        filesystem.write_json(place / OLDER_TEMPLATE, {"chat_template": template})
    return place
