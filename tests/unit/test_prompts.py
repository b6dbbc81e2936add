"""Prompts of training, evaluation, chat and transformers, over tokenizers and templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_steps.core.errors import ConfigError
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.processor import load_processor
from llava_steps.data.samples.prompt import Prompts
from llava_steps.data.samples.sample import SampleError, Turn
from llava_steps.data.samples.template import Template
from llava_steps.evaluation.ask import Stream, without_lead
from tests.helpers import chat_templates as templates
from tests.helpers.prompt_cases import (
    CASES,
    Asked,
    Case,
    conversation,
    differences,
    make,
    picture,
)

CONVERSATIONS = 6
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """Makes the directory of a case by name, with some fields replaced."""

    def make_case(name: str, rewrite: bool = True, **changes: Any) -> Path:
        return make(replace(BY_NAME[name], **changes), tmp_path / "hf", rewrite)

    return make_case


def turns(*texts: str, system: str = "") -> tuple[Turn, ...]:
    said = [Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    return (Turn("system", system), *said) if system else tuple(said)


def supervised(directory: Path, *texts: str, system: str = "") -> list[str]:
    """The supervised texts of a conversation."""
    encoder = ConversationEncoder(directory, 4096)
    labels = encoder.encode(turns(*texts, system=system)).shifted_labels.tolist()
    found: list[list[int]] = []
    for before, label in zip([-100, *labels], labels, strict=False):
        if label >= 0:
            found = [*found, []] if before < 0 else found
            found[-1].append(label)
    return [encoder.decode(ids) for ids in found]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_ids_are_the_same_everywhere(case: Case, tmp_path: Path) -> None:
    asked = Asked(make(case, tmp_path / "hf"))
    file = tmp_path / "image.png"
    file.write_bytes(picture())
    for number in range(CONVERSATIONS):
        turns = conversation(number, case.system)
        assert not differences(case, asked, turns, file), turns


def test_qwen3_answers_begin_with_their_think_block_where_it_stands(
    made: Callable[..., Path],
) -> None:
    directory = made("qwen3")
    block = "<think>\n\n</think>\n\n"
    assert supervised(directory, "a?", "A.") == [block + "A.<|im_end|>"]
    said = supervised(directory, "a?", "A.", "b?", "B.", system="Be kind.")
    assert said == ["A.<|im_end|>", block + "B.<|im_end|>"]
    # Of earlier answers the template drops the reasoning: they are context.
    thought = "<think>\nhm\n</think>\n\nA."
    assert supervised(directory, "a?", thought) == [thought + "<|im_end|>"]
    said = supervised(directory, "a?", thought, "b?", thought)
    assert said == [thought + "<|im_end|>"]
    prompts = Prompts(load_processor(directory))
    assert prompts.decode(prompts.lead()) == block


def test_what_a_template_writes_before_an_answer_is_not_part_of_it() -> None:
    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(chr(i) for i in ids)

    def streamed(text: str) -> tuple[str, int]:
        pieces: list[str] = []
        stream = Stream(Letters(), pieces.append, [ord(c) for c in "<t>"])
        import torch

        for character in "?" + text:
            stream.put(torch.tensor([ord(character)]))
        stream.end()
        return "".join(pieces), len(pieces)

    assert streamed("<t>yes") == ("yes", 3) and streamed("no") == ("no", 2)
    assert streamed("<t") == ("<t", 1) and streamed("<table") == ("<table", 4)
    assert without_lead([1, 2, 3], [1, 2]) == [3] and without_lead([1, 2], []) == [1, 2]


def test_earlier_answers_without_an_end_token_are_learned_without_one(
    made: Callable[..., Path],
) -> None:
    directory, channel = made("harmony"), "<|channel|>final<|message|>"
    said = supervised(directory, "a?", "A.", "b?", "B.")
    assert said == [f"{channel}A.", f"{channel}B.<|return|>"]
    encoded = ConversationEncoder(directory, 4096).encode(turns("a?", "A.", "b?", "B."))
    assert (encoded.answers, encoded.open_answers, encoded.context_answers) == (2, 1, 0)


def test_an_answer_that_begins_otherwise_than_its_prompt_ends(made: Callable[..., Path]) -> None:
    """Of Hugging Face's llava-interleave: `assistant`, a space and a line break, in the history."""
    directory = made("llava interleave")
    encoder = ConversationEncoder(directory, 4096)
    encoded = encoder.encode(turns("a?", "A.", "b?", "B."))
    text = encoder.decode(encoded.tokens.numpy())
    assert text.endswith("<|im_start|>assistant \nA.<|im_end|><|im_start|>user \nb?<|im_end|>"
                         "<|im_start|>assistant\nB.<|im_end|>")  # fmt: skip
    assert supervised(directory, "a?", "A.", "b?", "B.") == ["B.<|im_end|>"]
    assert (encoded.answers, encoded.context_answers) == (1, 1)
    assert encoder.length(turns("a?", "A.", "b?", "B.")) == len(encoded.tokens)


def test_a_system_turn_is_read_and_never_learned(made: Callable[..., Path]) -> None:
    directory = made("chatml on a base model")
    encoder = ConversationEncoder(directory, 4096)
    encoded = encoder.encode(turns("a?", "A.", system="Be kind."))
    assert "Be kind." in encoder.decode(encoded.tokens.numpy())
    assert supervised(directory, "a?", "A.", system="Be kind.") == ["A.<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma", "refuses the conversation: System role not supported"),
        ("mistral", "leaves out what the system says in turn 0"),
        ("pixtral", "refuses the conversation: Only user and assistant"),
    ],
)
def test_templates_without_a_system_turn_refuse_it_by_name(
    made: Callable[..., Path], name: str, reason: str
) -> None:
    encoder = ConversationEncoder(made(name), 4096)
    with pytest.raises(SampleError, match=reason):
        encoder.encode(turns("a?", "A.", system="Be kind."))


def test_a_text_that_a_template_leaves_out_is_refused(made: Callable[..., Path]) -> None:
    """LLaVA-NeXT's template writes only the first part of an answer, some only of a question."""
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content[0].type == 'image' %}<image>\n{{ message.content[1].text }}"
        "{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    directory = made("llava interleave", template=template)
    encoder = ConversationEncoder(directory, 4096)
    encoder.encode(turns("<image>\na?", "A."))
    with pytest.raises(SampleError, match=r"leaves out what the user says in turn 0|image tokens"):
        encoder.encode(turns("Here: <image>\nwhat is it?", "A."))
    with pytest.raises(SampleError, match=r"leaves out what the user says|image tokens"):
        Prompts(load_processor(directory)).ids(turns("Here: <image>\nwhat is it?"))


def test_templates_without_an_end_token_are_refused_with_the_remedy(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    directory = made("chatml on a base model", ends=())
    with pytest.raises(ConfigError, match=r"end tokens \['</s>'\].*set eos_token_id in gen.* to "):
        ConversationEncoder(directory, 4096)
    number = load_processor(directory).tokenizer.convert_tokens_to_ids("<|im_end|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": number}))
    assert supervised(directory, "a?", "A.") == ["A.<|im_end|>"]


def test_llava_15_can_be_asked_but_not_trained_with_its_own_template(
    made: Callable[..., Path], tmp_path: Path
) -> None:
    template = templates.LLAVA15.replace("END", "' '")
    directory = made("llava 1.5 with end tokens", template=template)
    with pytest.raises(ConfigError, match="give a chat template that writes one of them"):
        ConversationEncoder(directory, 4096)
    asked = object.__new__(Asked)
    trained = Asked(make(BY_NAME["llava 1.5 with end tokens"], tmp_path / "other"))
    asked.__dict__.update(trained.__dict__)
    asked.processor = asked.model._processor = load_processor(directory)
    asked.model._prompts = Prompts(asked.processor)
    question = turns("<image>\n<image>\nWhich?")
    for other in asked.transformers(question, prompt=True):
        assert other == asked.evaluation(question) == trained.evaluation(question)


def test_a_prompt_that_reads_differently_before_an_answer_is_refused(
    made: Callable[..., Path],
) -> None:
    """GPT-2's pattern takes two line breaks as one token at the end, as two before a word."""
    template = templates.CHATML.replace("assistant\n", "assistant\n\n").replace(
        "message['role'] + '\n'", "message['role'] + '\n\n'"
    )
    directory = made("chatml on a base model", rewrite=False, template=template)
    with pytest.raises((ConfigError, SampleError), match="differently when an answer follows"):
        ConversationEncoder(directory, 4096).encode(turns("a?", "A."))


@pytest.mark.parametrize("name", ["bos and eos", "only eos", "bos in both, and eos"])
def test_a_tokenizer_that_ends_every_text_ends_no_prompt(
    made: Callable[..., Path], name: str
) -> None:
    """A directory that others saved: the same ids in training and asking, without the end."""
    case = BY_NAME[name]
    foreign = Asked(made(name, rewrite=False))
    question = turns("<image>\nWhat?")
    prompt = foreign.evaluation(question)
    encoded = foreign.encoder.encode((*question, Turn("assistant", "A.")))
    assert encoded.tokens.tolist()[: len(prompt)] == prompt
    end = foreign.processor.tokenizer.convert_tokens_to_ids(case.eos)
    written = 2 if "<|im_start|>" in case.special else 1  # by the template
    assert prompt[-1] != end and encoded.tokens.tolist().count(end) == written


def test_rendering_is_linear_in_the_turns(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = ConversationEncoder(made("qwen3"), 1 << 20)
    written: list[int] = []
    apply = Template._apply

    def counted(self: Template, entries: Any, prompt: bool = False) -> str:
        text = apply(self, entries, prompt)
        written.append(len(text))
        return text

    monkeypatch.setattr(Template, "_apply", counted)

    def characters(count: int) -> int:
        written.clear()
        encoder.encode(turns(*(f"text {n}" for n in range(count))))
        return sum(written)

    first, second = characters(500), characters(1000)
    assert second < 3 * first
    assert characters(1000) < second / 3  # the layout of this shape is known
    assert len(written) == 1
