"""What is done to a chat template that is saved, and what is refused in one."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from llava_steps import build_hf, hf_to_megatron, megatron_to_hf
from llava_steps.core.errors import ConfigError
from llava_steps.data.samples import saved_prompts
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.processor import load_processor
from llava_steps.data.samples.prompt import Prompts
from llava_steps.data.samples.sample import Turn
from llava_steps.data.samples.template_text import refuse_changing, with_date
from llava_steps.settings.conversion import HfExport, HfModel, MegatronCheckpoint
from tests.helpers import chat_templates as templates
from tests.helpers.data_fixtures import fake_context
from tests.helpers.hf_fixtures import STRING_TEMPLATE, make_text, make_tokenizer, make_tower
from tests.helpers.prompt_cases import CASES, DATE, make

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Makes the directory of a case by name, with some fields replaced."""

    def make_case(name: str, rewrite: bool = True, **changes: Any) -> Path:
        return make(replace(BY_NAME[name], **changes), tmp_path / "hf", rewrite)

    return make_case


def test_a_template_that_asks_for_the_date_is_refused_or_given_one(
    made: Callable[..., Path],
) -> None:
    directory = made("llama3", rewrite=False)
    for make_prompts in (lambda: ConversationEncoder(directory, 99), lambda: load(directory)):
        with pytest.raises(ConfigError, match=r"today's date .*hf_model\.template_date"):
            make_prompts()
    with pytest.raises(ConfigError, match="today's date"):
        saved_prompts.rewrite(directory)
    saved_prompts.rewrite(directory, DATE)
    ids = load(directory).ids([Turn("user", "a?")])
    assert "Today Date: 26 Jul 2024\n" in load(directory).decode(ids)
    before = (directory / "chat_template.jinja").read_bytes()
    saved_prompts.rewrite(directory, datetime.date(2025, 1, 1))
    assert (directory / "chat_template.jinja").read_bytes() == before


def load(directory: Path) -> Prompts:
    return Prompts(load_processor(directory))


@pytest.mark.parametrize(
    "form",
    ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %y", "%e %j %H:%M:%S %I %p", "%F %D %T %U %w %u %V %G"],
)
def test_a_fixed_date_is_written_in_every_form(form: str) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    date = datetime.datetime(2024, 2, 5)
    text = with_date("{%- macro head(f) %}On {{ strftime_now(f) }}{% endmacro %}\n{{ head(form) }}",
                     date.date())  # fmt: skip
    refuse_changing(text)
    assert _compile_jinja_template(text).render(form=form) == "On " + date.strftime(form)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ strftime_now('%Y') }}", "today's date"),
        ("{%- set today = strftime_now %}{{ today('%Y') }}", "today's date"),
        ("{{ ['a', 'b'] | random }}", "draws at random"),
        ("{{ lipsum() }}", "draws at random"),
        ("{% now 'utc' %}", "not valid Jinja"),
        ("{% for m in messages %}", "not valid Jinja"),
    ],
)
def test_prompts_never_change_from_call_to_call(template: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        refuse_changing(template)


@pytest.mark.parametrize("call", ["now()", "now().strftime('%Y')", "datetime.now()"])
def test_other_clocks_do_not_exist_in_templates(made: Callable[..., Path], call: str) -> None:
    template = "{{ " + call + " }}" + templates.CHATML
    directory = made("qwen2", rewrite=False, template=template)
    name = call.partition("(")[0].partition(".")[0]
    with pytest.raises(ConfigError, match=f"it fails with: '{name}' is undefined"):
        ConversationEncoder(directory, 99)


# ---- the saved template


def test_named_templates_without_a_default_are_refused_by_name(made: Callable[..., Path]) -> None:
    template = {"rag": templates.CHATML, "tool_use": templates.CHATML}
    directory = made("named templates", rewrite=False, template=template)
    with pytest.raises(
        ConfigError, match=r"several chat templates \(rag, tool_use\) but no default"
    ):
        ConversationEncoder(directory, 99)


def test_a_template_that_takes_both_forms_is_kept(made: Callable[..., Path]) -> None:
    directory = made("demo", rewrite=False)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    saved_prompts.rewrite(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("name", ["qwen3", "llava interleave", "pixtral", "gemma"])
def test_the_saved_template_takes_texts_and_parts(made: Callable[..., Path], name: str) -> None:
    """Also mixed, parts of a type that is not supported are refused, and twice changes nothing."""
    directory = made(name)
    processor = load_processor(directory)
    parts = [{"type": "text", "text": "See"}, {"type": "image"}, {"type": "text", "text": "Well?"}]
    texts = set()
    for content in (parts, "See\n<image>\nWell?"):
        for answer in ([{"type": "text", "text": "A."}], "A."):
            talk = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            texts.add(processor.apply_chat_template([*talk, talk[0]], add_generation_prompt=True))
    assert len(texts) == 1 and texts.pop().count("<image>") == 2
    before = (directory / "chat_template.jinja").read_bytes()
    saved_prompts.rewrite(directory)
    assert (directory / "chat_template.jinja").read_bytes() == before


def test_parts_of_other_types_are_refused_by_a_saved_template(made: Callable[..., Path]) -> None:
    processor = load_processor(made("qwen3"))
    with pytest.raises(Exception, match="a part of type video, not text or image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


# ---- in the steps that save it


def text_model(path: Path, template: str, end: bool = False) -> Path:
    """A language model whose tokenizer may end every text."""
    tokenizer = make_tokenizer(template)
    if end:
        ends = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        ends += [(tokenizer.eos_token, tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A {tokenizer.eos_token}", special_tokens=ends
        )
    return make_text(path, tokenizer)


def build(tmp_path: Path, template: str, end: bool = False, **settings: Any) -> Path:
    tower = make_tower(tmp_path / "tower")
    text = text_model(tmp_path / "text", template, end)
    out = tmp_path / "built"
    out.mkdir()
    cfg = HfModel(vision_tower=str(tower), text_model=str(text), **settings)
    build_hf.run(fake_context(out, vision_tower=tower, text_model=text), cfg)
    return out


DATED = "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }} " + STRING_TEMPLATE.removeprefix(
    "{{ bos_token }}"
)


def test_build_hf_refuses_a_clock_before_it_reads_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_steps.conversion.build.build", None)
    with pytest.raises(ConfigError, match=r"set hf_model\.template_date"):
        build(tmp_path, DATED)


def test_a_built_model_has_one_date_and_takes_both_forms_and_ends_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(tmp_path, DATED, end=True, template_date="2024-07-26")
    encoder = ConversationEncoder(built, 99)
    encoded = encoder.encode([Turn("user", "<image>\nWhat?"), Turn("assistant", "A.")])
    text = encoder.decode(encoded.tokens.numpy())
    assert text.startswith("<s>Today: 26 Jul 2024 [user]") and text.count("</s>") == 1
    # As every example of Hugging Face asks.
    pipe = transformers.pipeline("image-text-to-text", model=str(built))
    image = PIL.Image.new("RGB", (30, 40))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    asked: list[list[int]] = []
    generate = type(pipe.model).generate

    def listen(self: Any, input_ids: Any, **options: Any) -> Any:
        asked.append(input_ids[0].tolist())
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(pipe.model), "generate", listen)
    pipe(text=[{"role": "user", "content": parts}], max_new_tokens=1)
    assert asked == [encoded.tokens.tolist()[: len(asked[0])]]
    assert encoded.shifted_labels[len(asked[0]) - 1] >= 0
    assert (encoded.shifted_labels[: len(asked[0]) - 1] < 0).all()


@pytest.mark.parametrize("date", ["26 Jul 2024", "2024-13-01", "today"])
def test_a_wrong_date_is_refused(date: str) -> None:
    with pytest.raises(ValueError, match="template_date"):
        HfModel(vision_tower="a", text_model="b", template_date=date)


def test_build_hf_says_that_nothing_can_be_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A ChatML template on a base model, whose end token it does not write."""
    chatml = templates.CHATML.replace("<|im_end|>", "<|assistant|>")
    build(tmp_path, chatml)
    assert "nothing can be trained with this model: " in caplog.text
    assert "set eos_token_id in generation_config.json" in caplog.text


def test_an_export_of_a_model_that_others_saved_is_asked_alike(tmp_path: Path) -> None:
    """Its template takes texts only, and its tokenizer ends every text."""
    built = build(tmp_path, STRING_TEMPLATE, end=True)
    (built / "chat_template.jinja").write_text(STRING_TEMPLATE)
    saved = json.loads((tmp_path / "text/tokenizer.json").read_bytes())["post_processor"]
    path = built / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"post_processor": saved}))
    turns = [Turn("user", "<image>\nWhat?")]
    prompt = load(built).ids(turns)
    for name in ("megatron", "export"):
        (tmp_path / name).mkdir()
    given = MegatronCheckpoint(hf_dir=str(built))
    hf_to_megatron.run(fake_context(tmp_path / "megatron", hf_dir=built), given)
    context = fake_context(
        tmp_path / "export", megatron_dir=tmp_path / "megatron", tokenizer_dir=built
    )
    megatron_to_hf.run(context, HfExport())
    processor = load_processor(tmp_path / "export")
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    assert load(tmp_path / "export").ids(turns) == prompt
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == prompt
    assert processor.tokenizer("a")["input_ids"][-1] != processor.tokenizer.eos_token_id
