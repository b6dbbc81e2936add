"""Ids, labels and pixels against the processor of transformers and against brute force."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.decode import decode
from llava_steps.data.samples.images import ImageTransform
from llava_steps.data.samples.processor import load_processor
from llava_steps.data.samples.sample import Sample, SampleError, Turn, from_parts
from llava_steps.data.samples.template import message_parts
from tests.helpers.data_fixtures import TEMPLATE, jpeg, make_hf_dir, sample_parts

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_dir(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def encoder(hf_dir: Path) -> ConversationEncoder:
    return ConversationEncoder(hf_dir, 512)


@pytest.fixture(scope="module")
def processor(hf_dir: Path) -> Any:
    return load_processor(hf_dir)


def turns(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts))


def reference(processor: Any, sample: Sample) -> dict[str, torch.Tensor]:
    """What transformers makes of the sample through its documented entry."""
    images = iter(sample.images)
    messages = []
    for turn in sample.turns:
        parts: list[dict[str, Any]] = list(message_parts(turn.content))
        for part in parts:
            if part["type"] == "image":
                part["image"] = Image.open(io.BytesIO(next(images)))
        messages.append({"role": turn.role, "content": parts})
    out: dict[str, torch.Tensor] = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return out


def decoded_answers(processor: Any, labels: torch.Tensor) -> str:
    text: str = processor.tokenizer.decode(labels[labels != -100])
    return text


@pytest.mark.parametrize("number", range(10))
def test_ids_and_pixels_equal_the_processors(
    encoder: ConversationEncoder, processor: Any, number: int
) -> None:
    sample = from_parts("0", sample_parts(number))
    expected = reference(processor, sample)
    encoded = encoder.encode(sample.turns)
    assert torch.equal(encoded.tokens, expected["input_ids"][0])
    if sample.images:
        pixels = encoder.images(sample.images)
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, expected["pixel_values"])


@pytest.mark.parametrize("number", range(10))
def test_labels_are_exactly_the_answers_and_their_end(
    encoder: ConversationEncoder, processor: Any, number: int
) -> None:
    """Brute force: walk through the ids from assistant header to end token."""
    sample = from_parts("0", sample_parts(number))
    encoded = encoder.encode(sample.turns)
    ids = encoded.tokens.tolist()
    header = processor.tokenizer.encode("<|assistant|>\n", add_special_tokens=False)
    user = processor.tokenizer.convert_tokens_to_ids("<|user|>")
    end = processor.tokenizer.eos_token_id
    expected, answering = [-100] * len(ids), False
    for place in range(len(ids)):
        if answering:
            expected[place - 1] = ids[place]
            answering = ids[place] != end
        elif ids[place - len(header) + 1 : place + 1] == header:
            answering = True
        assert not (answering and ids[place] == user)
    assert encoded.shifted_labels.tolist() == expected
    assert encoded.shifted_labels[-1] == -100
    answers = "".join(turn.content + "</s>" for turn in sample.turns[1::2])
    assert decoded_answers(processor, encoded.shifted_labels) == answers
    assert encoded.supervised == sum(label != -100 for label in expected)


SAFE_TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda t: t.strip() and "<" not in t
)


@settings(max_examples=150, deadline=None)
@given(st.lists(SAFE_TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_any_text_is_supervised_exactly(
    encoder: ConversationEncoder, processor: Any, texts: list[str]
) -> None:
    encoded = encoder.encode(turns(*texts))
    expected = reference(processor, Sample("0", turns(*texts), ()))["input_ids"][0]
    assert torch.equal(encoded.tokens, expected)
    labels = encoded.shifted_labels
    assert decoded_answers(processor, labels) == "".join(t + "</s>" for t in texts[1::2])
    assert torch.equal(labels[:-1][labels[:-1] != -100], encoded.tokens[1:][labels[:-1] != -100])


def test_a_text_template_gives_the_same_ids_as_its_own_rendering(tmp_path: Path) -> None:
    hf_dir = make_hf_dir(tmp_path, CHATML)
    encoder, processor = ConversationEncoder(hf_dir, 512), load_processor(hf_dir)
    encoded = encoder.encode(turns("<image>\nWhat?", "A seven."))
    messages = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A seven."},
    ]
    text = processor.apply_chat_template(messages)
    expected = processor(text=text, images=decode(jpeg(0)), return_tensors="pt")["input_ids"][0]
    assert torch.equal(encoded.tokens, expected)
    assert decoded_answers(processor, encoded.shifted_labels) == "A seven.</s>"


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (turns("Hello </s> you", "yes"), "control token '</s>' in the text of turn 0"),
        (turns("Hello", "yes <|user|>"), "control token '<|user|>' in the text of turn 1"),
        (turns("Hello", "word " * 600), "more than seq_length 512"),
        (turns("Hello <image>", "an <image>"), "an answer contains an image token"),
    ],
)
def test_samples_are_refused_by_name(
    encoder: ConversationEncoder, conversation: tuple[Turn, ...], reason: str
) -> None:
    with pytest.raises(SampleError) as caught:
        encoder.encode(conversation)
    assert reason in str(caught.value)


ROUNDS = ("<image>\nWhat?", "A seven.", "And <image> this?", "An eight, I think.", "Sure?", "Yes.")


@pytest.mark.parametrize("template", [TEMPLATE, CHATML])
def test_what_is_too_long_is_cut_after_the_last_answer_that_fits(
    tmp_path: Path, template: str
) -> None:
    """At each limit: the rounds that `encode` alone finds to fit, or part of the first answer."""
    hf_dir = make_hf_dir(tmp_path, template)
    free = ConversationEncoder(hf_dir, 512)
    whole = free.encode(turns(*ROUNDS))
    assert (whole.images, whole.answers, whole.cut) == (2, 3, False)
    # The tokens up to the end of each answer: what follows it, a line break, may be left out.
    ends = [int(n) + 2 for n in (whole.shifted_labels == free.end_ids[0]).nonzero()]
    first = int((whole.shifted_labels != -100).nonzero()[0]) + 2
    for limit in range(1, len(whole.tokens) + 1):
        encoder = ConversationEncoder.__new__(ConversationEncoder)
        encoder.__dict__.update(free.__dict__ | {"seq_length": limit, "_truncate": True})
        if limit < first:
            with pytest.raises(SampleError, match="no part of an answer"):
                encoder.encode(turns(*ROUNDS))
            continue
        rounds = sum(end <= limit for end in ends)
        kept = ends[rounds - 1] if rounds else limit
        kept = len(whole.tokens) if limit == len(whole.tokens) else kept
        item = encoder.encode(turns(*ROUNDS))
        assert torch.equal(item.tokens, whole.tokens[:kept])
        assert torch.equal(item.shifted_labels[:-1], whole.shifted_labels[: kept - 1])
        assert item.shifted_labels[-1] == -100
        assert item.answers == rounds and item.images == (2 if rounds > 1 else 1)
        assert item.cut is (limit < len(whole.tokens))
        assert encoder.length(turns(*ROUNDS)) == kept


def test_an_image_of_the_first_question_is_never_cut(tmp_path: Path) -> None:
    hf_dir = make_hf_dir(tmp_path)
    question = ("What? " * 20 + "<image>", "A seven.")
    whole = ConversationEncoder(hf_dir, 512).encode(turns(*question))
    last = int((whole.tokens == whole.tokens[-1]).nonzero()[0])
    image = int((whole.tokens.diff() == 0).nonzero()[-1])
    assert 60 < image < last
    with pytest.raises(SampleError, match="with all its images"):
        ConversationEncoder(hf_dir, image - 3, truncate=True).encode(turns(*question))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TEMPLATE.replace("{{ eos_token }}", "."), "none of the end tokens"),
        (TEMPLATE.replace("{% endif %}{% endfor -%}", "?{% endif %}{% endfor -%}!"), "end tokens"),
        (TEMPLATE.replace("{{ bos_token }}", "{{ messages | length }}"), "changes what it wrote"),
        (TEMPLATE.replace("<image>", "<picture>"), "writes the image token neither"),
    ],
)  # fmt: skip
def test_templates_that_hide_the_answers_are_refused(
    tmp_path: Path, template: str, reason: str
) -> None:
    make_hf_dir(tmp_path, template)
    with pytest.raises(ConfigError, match=reason):
        ConversationEncoder(tmp_path, 512)


def test_a_token_across_the_border_of_an_answer_is_refused(tmp_path: Path) -> None:
    """A prompt that ends in a space, which the tokenizer glues to the answer's first word."""
    template = TEMPLATE.replace("<|{{ m.role }}|>\n", "<|{{ m.role }}|>\n.{{ ' ' }}").replace(
        "<|assistant|>\n{% endif %}", "<|assistant|>\n.{{ ' ' }}{% endif %}"
    )
    make_hf_dir(tmp_path, template)
    with pytest.raises((ConfigError, InputError), match="crosses the border"):
        ConversationEncoder(tmp_path, 512).encode(turns("What?", "digit"))


def test_a_directory_without_a_processor_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no processor .* config\.json is missing; give the dir"):
        ConversationEncoder(tmp_path, 512)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(InputError, match=r"no processor can be loaded from it \("):
        ConversationEncoder(tmp_path, 512)


@pytest.mark.parametrize(
    ("text", "why"), [("[1]", "does not hold a JSON object"), ("{", "cannot be read")]
)
def test_a_generation_config_that_cannot_be_used_is_named(
    tmp_path: Path, text: str, why: str
) -> None:
    make_hf_dir(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=rf"generation_config\.json.* {why}"):
        ConversationEncoder(tmp_path, 512)


def test_several_end_tokens_of_the_generation_config_are_accepted(tmp_path: Path) -> None:
    make_hf_dir(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert ConversationEncoder(tmp_path, 99).encode(turns("a", "b")).supervised == 2


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(32, 32), (640, 480), (21, 90), (90, 21), (33, 31)])
def test_pixels_of_any_shape_equal_the_processors(
    processor: Any, size: tuple[int, int], orientation: int, tmp_path: Path
) -> None:
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.jpg"
    path.write_bytes(jpeg(7, size, exif=exif))
    expected = processor.image_processor(load_image(str(path)), return_tensors="pt")
    assert torch.equal(
        ImageTransform(processor.image_processor)([path.read_bytes()]), expected["pixel_values"]
    )


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colour_modes_equal_the_processors(processor: Any, mode: str) -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(jpeg(3))).convert(mode).save(out, "JPEG")
    expected = processor.image_processor(
        Image.open(io.BytesIO(out.getvalue())), return_tensors="pt"
    )["pixel_values"]
    assert torch.equal(ImageTransform(processor.image_processor)([out.getvalue()]), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 24, "width": 40}, "do_center_crop": False},
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 32, "width": 32}},
        {"do_resize": False, "crop_size": {"height": 32, "width": 32}},
        {"do_normalize": False, "crop_size": {"height": 32, "width": 32}},
        {"resample": 2, "rescale_factor": 1 / 127.5, "image_mean": [1] * 3, "image_std": [2] * 3},
    ],
)  # fmt: skip
def test_processors_with_other_settings_are_matched_too(options: dict[str, Any]) -> None:
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    kinds = [CLIPImageProcessorPil]
    if "crop_size" not in options:
        kinds.append(SiglipImageProcessorPil)
    for kind in kinds:
        processor = kind(**options)
        data = [jpeg(1, (50, 61)), jpeg(2, (20, 14))]
        expected = processor([decode(d) for d in data], return_tensors="pt")["pixel_values"]
        assert torch.equal(ImageTransform(processor)(data), expected)


def test_images_of_varying_size_are_refused() -> None:
    from transformers import CLIPImageProcessorPil

    with pytest.raises(ConfigError, match="different shapes"):
        ImageTransform(CLIPImageProcessorPil(do_center_crop=False))


@pytest.mark.parametrize("data", [b"", b"GIF89a", jpeg(0)[:200], jpeg(0)[:-40]])
def test_broken_images_are_sample_errors(processor: Any, data: bytes) -> None:
    with pytest.raises(SampleError, match="image 1: unreadable"):
        ImageTransform(processor.image_processor)([jpeg(0), data])
