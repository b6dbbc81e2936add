"""A model directory from which lmms-eval writes the prompts that the model was trained on.

Its `llava_hf` model differs from apply_chat_template with an export in two ways:

* It passes each content as a list of parts. A template that takes a text, as those of most language
  models do, fails on that.
* It tokenizes the rendered text as plain text, so a tokenizer that begins every text with <s> puts
  a second one before that of the template.

Both are fixed in the template: a directory of links to the model's files, with a few lines of Jinja
around its template. The resulting prompts are compared with the model's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError

TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"
CONVERSATION = [("user", "<image>\nA?"), ("assistant", "B."), ("user", "C?")]


def directory(model: Path, parent: Path) -> Path:
    """`model`, or a new directory in `parent` that differs from it in the chat template.

    Raises:
        InputError, ConfigError: as `ask.Model`.
        ConfigError: the prompts would differ from those of the model.
    """
    from llava_steps.data.samples.processor import load_processor
    from llava_steps.data.samples.prompt import Prompts
    from llava_steps.data.samples.sample import Turn
    from llava_steps.data.samples.template_text import without_bos
    from llava_steps.evaluation import ask

    ask.check_llava(model)
    processor = load_processor(model)
    try:
        prompts = Prompts(processor)
    except ConfigError as error:
        raise ConfigError(f"{model}: {error}") from error
    wanted = prompts.ids([Turn(role, text) for role, text in CONVERSATION])
    if _ids(processor, prompts.template.text) == wanted:
        return model
    both = prompts.template.both_forms()
    for text in (both, without_bos(both)):
        if _ids(processor, text) == wanted:
            return _linked(model, parent / model.name, text)
    raise ConfigError(
        f"{model}: the prompts of lmms-eval would differ from the chat template; export the model "
        "again, or give a tokenizer that adds no tokens to a text"
    )


def _ids(processor: Any, template: str) -> list[int]:
    """The ids of lmms-eval: contents as parts, the prompt tokenized as any text; [] if it fails."""
    from llava_steps.data.samples.template import message_parts

    turns = [{"role": role, "content": message_parts(text)} for role, text in CONVERSATION]
    try:
        prompt = processor.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template may fail in any way on parts
        return []
    ids: list[int] = processor.tokenizer(prompt)["input_ids"]
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
