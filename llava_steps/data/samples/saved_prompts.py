"""Rewrites the files of an HF directory so that transformers makes the prompts of training.

* chat_template.jinja writes a fixed date instead of today's, and takes contents as text and as
  parts: a template of a language model would fail on the parts that processors and pipelines give.
* The tokenizer puts nothing after a text. An end token after a prompt would be asked with, and a
  second one would follow every answer.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.answers import Answers
from llava_steps.data.samples.conversation import end_ids
from llava_steps.data.samples.processor import load_processor
from llava_steps.data.samples.prompt import Prompts, added_around
from llava_steps.data.samples.template import Template, default_template
from llava_steps.data.samples.template_text import CLOCK, changing, with_date

TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"
OTHER_TEMPLATES = "additional_chat_templates"
"""Folder of templates with names; prompts are those of the default one."""
_ADDING = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


def rewrite(directory: Path, date: datetime.date | None = None) -> None:
    """Rewrite chat template and tokenizer of a directory where needed.

    Raises:
        InputError: no processor can be loaded from it.
        ConfigError: no chat template, or one that cannot be used; tokens that stay after a text.
    """
    processor = load_processor(directory)
    text = before = default_template(processor)
    if date is not None and CLOCK in changing(text):
        text = with_date(text, date)
    text = Template(processor, text).both_forms()
    if text != before or isinstance(processor.chat_template, dict):
        _write_template(directory, text)
        filesystem.remove(directory / OTHER_TEMPLATES)
    if added_around(processor.tokenizer.backend_tokenizer)[1]:
        _end_nothing(directory)
        if added_around(load_processor(directory).tokenizer.backend_tokenizer)[1]:
            raise ConfigError(
                f"{directory}: the tokenizer ends every text with a token, also a prompt; set "
                "add_eos_token to false in the tokenizer_config.json of the language model"
            )


def check(directory: Path) -> None:
    """ConfigError if no conversation can be trained on with the directory's template."""
    processor = load_processor(directory)
    tokenizer = processor.tokenizer
    ends = [tokenizer.convert_ids_to_tokens(i) for i in end_ids(directory, tokenizer)]
    Answers(Prompts(processor).template, processor, ends)


def _write_template(directory: Path, text: str) -> None:
    filesystem.write_bytes(directory / TEMPLATE, text.encode())
    if (directory / OLDER_TEMPLATE).exists():
        filesystem.write_json(directory / OLDER_TEMPLATE, {"chat_template": text})


def _end_nothing(directory: Path) -> None:
    """Leave out of the tokenizer's files what it puts after a text."""
    path = directory / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    processor = load_processor(directory)
    before = added_around(processor.tokenizer.backend_tokenizer)[0]
    tokens = processor.tokenizer.convert_ids_to_tokens(before)
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    special = {
        token: {"id": token, "ids": [number], "tokens": [token]}
        for token, number in zip(tokens, before, strict=True)
    }
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    adding = {
        "type": "TemplateProcessing",
        "single": [*single, text],
        "pair": [*single, text, second],
        "special_tokens": special,
    }
    given = tokenizer["post_processor"]
    kept = given["processors"] if given["type"] == "Sequence" else [given]
    kept = [part for part in kept if part["type"] not in _ADDING]
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [*kept, adding]}
    filesystem.write_bytes(path, json.dumps(tokenizer, ensure_ascii=False, indent=2).encode())
    path = directory / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "add_eos_token" in config:
        filesystem.write_json(path, {**config, "add_eos_token": False})
