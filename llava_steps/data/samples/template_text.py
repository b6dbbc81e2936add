"""Chat templates as Jinja text: what they depend on, with a fixed date, for both forms of contents.

A content is a text, or a list of parts such as {"type": "image"} and {"type": "text", "text": ...}.
Templates of language models take the text only, those of many Hugging Face processors the parts
only. `with_both_forms` puts lines before a template that turn one form into the other.
"""

from __future__ import annotations

import datetime
import json
import re
from typing import Literal, cast

from llava_steps.core.errors import ConfigError

Form = Literal["parts", "user parts", "text"]
"""Which contents a template takes as a list of parts: all, those of users only, none."""
CLOCK = "strftime_now"
"""The function by which chat templates ask for the current date."""
_RANDOM = ("random", "lipsum")
_MARK = "contents are texts or lists of parts; the template takes"
_MARKED = re.compile(re.escape(_MARK) + r" ([a-z ]+) #\}")
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
END = "{{- '' }}"
"""Follows lines put before a template, to keep white space at the beginning of the template."""

_TO_TEXT = """\
{%- set plain = namespace(messages=[], text='', gap='') -%}
{%- for message in messages -%}
{%- set plain.text = '' -%}
{%- set plain.gap = '' -%}
{%- if message['content'] is string -%}
{%- set plain.text = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- if plain.gap or (plain.text and plain.text == plain.text.rstrip()) -%}
{%- set plain.text = plain.text + '\\n' -%}
{%- endif -%}
{%- set plain.text = plain.text + IMAGE -%}
{%- set plain.gap = '\\n' -%}
{%- elif part['type'] != 'text' -%}
{{- raise_exception('a content has a part of type ' ~ part['type'] ~ ', not text or image') -}}
{%- elif part['text'] -%}
{%- if plain.gap and part['text'] == part['text'].lstrip() -%}
{%- set plain.text = plain.text + plain.gap -%}
{%- endif -%}
{%- set plain.text = plain.text + part['text'] -%}
{%- set plain.gap = '' -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set plain.messages = plain.messages + [dict(message, content=plain.text)] -%}
{%- endfor -%}
{%- set messages = plain.messages %}"""

_TO_PARTS = """\
{%- set plain = namespace(messages=[], parts=[], text='') -%}
{%- for message in messages -%}
{%- set plain.parts = message['content'] -%}
{%- if message['content'] is string -%}
{%- set plain.parts = [] -%}
{%- for piece in message['content'].split(IMAGE) -%}
{%- set plain.text = piece -%}
{%- if not loop.first -%}
{%- set plain.parts = plain.parts + [{'type': 'image'}] -%}
{%- if plain.text.startswith('\\n') -%}
{%- set plain.text = plain.text[1:] -%}
{%- endif -%}
{%- endif -%}
{%- if not loop.last and plain.text.endswith('\\n') -%}
{%- set plain.text = plain.text[:-1] -%}
{%- endif -%}
{%- if plain.text -%}
{%- set plain.parts = plain.parts + [{'type': 'text', 'text': plain.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set plain.messages = plain.messages + [dict(message, content=plain.parts)] -%}
{%- endfor -%}
{%- set messages = plain.messages %}"""

_USER_PARTS = """\
{%- set sorted_out = namespace(messages=[]) -%}
{%- set all_parts = messages -%}
TO_TEXT
{%- set all_texts = messages -%}
{%- set messages = all_parts -%}
TO_PARTS
{%- for message in messages -%}
{%- set taken = message if message['role'] == 'user' else all_texts[loop.index0] -%}
{%- set sorted_out.messages = sorted_out.messages + [taken] -%}
{%- endfor -%}
{%- set messages = sorted_out.messages %}"""


def changing(text: str) -> list[str]:
    """What of the text makes prompts differ from day to day or call to call, in Jinja's words.

    Raises:
        ConfigError: it is not a Jinja template.
    """
    from jinja2 import TemplateError, meta, nodes

    try:
        # The environment of transformers, which knows its own tags.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # Without its own functions, which do not count as undeclared.
        environment = _compile_jinja_template(text).environment.overlay()
        environment.globals = {}
        tree = environment.parse(text)
    except TemplateError as error:
        raise ConfigError(f"the chat template is not valid Jinja: {error}") from error
    names = set(meta.find_undeclared_variables(tree)) & {CLOCK, *_RANDOM}
    names |= {node.name for node in tree.find_all(nodes.Filter) if node.name in _RANDOM}
    return sorted(names)


def refuse_changing(text: str) -> None:
    """ConfigError if two renderings of a conversation may differ, or it is not a template."""
    names = changing(text)
    if CLOCK in names:
        raise ConfigError(
            f"the chat template writes today's date ({CLOCK}), so prompts would change from day to "
            "day; set hf_model.template_date and build the model with it, or write a fixed date "
            "into the template"
        )
    if names:
        raise ConfigError(
            f"the chat template draws at random ({', '.join(names)}), so no two prompts would be "
            "the same; remove that from the template"
        )


def with_date(text: str, date: datetime.date) -> str:
    """The template with the function for the current date replaced by one of a fixed `date`.

    Names of days and months are English, whatever the locale; the time is midnight.
    """
    day, month = _DAYS[date.weekday()], _MONTHS[date.month - 1]
    values = {
        "-d": str(date.day), "-m": str(date.month), "-j": str(date.timetuple().tm_yday),
        "-I": "12", "-H": "0", "-M": "0", "-S": "0", "-y": str(date.year % 100),
        "e": f"{date.day:2d}", "F": date.isoformat(), "D": f"{date:%m/%d/%y}", "T": "00:00:00",
        "R": "00:00", "a": day[:3], "A": day, "b": month[:3], "h": month[:3], "B": month,
        "c": f"{day[:3]} {month[:3]} {date.day:2d} 00:00:00 {date.year}",
        "x": f"{date:%m/%d/%y}", "X": "00:00:00", "I": "12", "p": "AM", "f": "000000",
        "Z": "", "z": "", "Y": f"{date.year:04d}",
        **{name: date.strftime(f"%{name}") for name in "dmyjHMSuwUWVG"},
    }  # fmt: skip
    replaced = "".join(
        f" | replace({json.dumps('%' + name)}, {json.dumps(value)})"
        for name, value in values.items()
    )
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro %}}{END}{text}"


def with_both_forms(text: str, form: Form, image_token: str) -> str:
    """The template with lines before it, after which it takes texts and lists of parts.

    A text and the list of parts that stands for it give the same prompt; between an image and text
    that no white space separates, the list of parts has a line break.
    """
    lines = {
        "text": _TO_TEXT,
        "parts": _TO_PARTS,
        "user parts": _USER_PARTS.replace("TO_TEXT", _TO_TEXT).replace("TO_PARTS", _TO_PARTS),
    }[form]
    mark = f"{{#- {_MARK} {form} #}}"
    return f"{mark}{lines.replace('IMAGE', json.dumps(image_token))}{END}{text}"


def native_form(text: str) -> Form | None:
    """The form that the template took before `with_both_forms`; None if it is as it was."""
    match = _MARKED.search(text[:200])
    return cast(Form, match[1]) if match else None


def without_bos(text: str) -> str:
    """The template without a beginning token at the start of what it writes."""
    # Jinja drops one line break at the end of a template, but not at the end of a block.
    body = text.removesuffix("\n")
    return (
        f"{{%- set whole %}}{END}{body}{{%+ endset -%}}"
        "{%- if bos_token and whole.startswith(bos_token) -%}"
        "{%- set whole = whole[bos_token | length:] -%}{%- endif -%}{{ whole }}"
    )
