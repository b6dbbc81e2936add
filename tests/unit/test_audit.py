"""The audit finds what was planted, and passes what is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_steps import audit as step
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.data.loader import audit
from llava_steps.data.loader.corpus import Corpus, SampleRef
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.encoded import Encoded
from llava_steps.data.samples.sample import from_parts
from llava_steps.settings.dataset import Audit
from tests.helpers.data_fixtures import (
    fake_context,
    make_energon,
    make_hf_dir,
    members,
    sample_parts,
    write_tar,
)

SAMPLES = 25
PLAIN: dict[str, Any] = {"seq_length": 512, "samples": 0}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_hf_dir(tmp_path_factory.mktemp("hf"))
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_energon(tmp_path_factory.mktemp("data") / "set", SAMPLES, 10)


def run(hf_dir: Path, dataset: Path, out: Path, **settings: Any) -> Any:
    out.mkdir(parents=True, exist_ok=True)
    context = fake_context(out, tokenizer_load_dir=hf_dir, data_path=dataset)
    return step.run(context, Audit(**{**PLAIN, **settings}))


def test_a_right_dataset_passes_and_is_counted(
    hf_dir: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(hf_dir, dataset, tmp_path)
    parts = [from_parts(str(n), sample_parts(n)) for n in range(SAMPLES)]
    encoder = ConversationEncoder(hf_dir, 512)
    encoded = [encoder.encode(sample.turns) for sample in parts]
    assert found["samples"] == found["usable"] == found["samples_in_split"] == SAMPLES
    assert found["refused"] == found["broken"] == found["truncated"] == 0
    assert found["images"] == sum(len(sample.images) for sample in parts)
    assert found["answers"] == sum(len(sample.turns) // 2 for sample in parts)
    assert found["tokens"] == sum(len(item.tokens) for item in encoded)
    assert found["supervised_tokens"] == sum(item.supervised for item in encoded)
    sizes = [len(item.tokens) for item in encoded]
    rows = found["lengths"]["histogram"]
    assert [found["lengths"][key] for key in ("min", "max")] == [min(sizes), max(sizes)]
    for row in rows:
        assert row["samples"] == sum(row["from"] <= size < row["to"] for size in sizes)
    assert sum(row["samples"] for row in rows) == SAMPLES
    assert json.loads((tmp_path / "report.json").read_text())["tokens"] == found["tokens"]
    text = (tmp_path / "examples.txt").read_text()
    assert text.count("---") == 3 and text in capsys.readouterr().err
    assert "<image> x 16" in text and "<|assistant|>\n[[It is a 0.</s>]]" in text
    pictures = json.loads((tmp_path / "examples.json").read_text())
    shown = pictures["examples"][0]
    pieces = (f"[[{text}]]" if supervised else text for text, supervised in shown["pieces"])
    assert "".join(pieces) in text and shown["tokens"] == sizes[0]
    assert 0 < len(pictures["thumbnails"]) <= 12
    for row in pictures["thumbnails"]:
        assert (tmp_path / row["image"]).read_bytes().startswith(b"\xff\xd8\xff")


def test_a_part_is_spread_over_the_split(dataset: Path) -> None:
    corpus = Corpus(dataset, "train", 0)
    some = audit.choose(corpus, 5, 7)
    assert len({place.index for place in some}) == 5 and some == audit.choose(corpus, 5, 7)
    assert some != audit.choose(corpus, 5, 8)
    everything = [SampleRef(0, n) for n in range(SAMPLES)]
    assert audit.choose(corpus, 0, 7) == audit.choose(corpus, 99, 7) == everything


def test_samples_that_training_would_refuse_are_named(hf_dir: Path, tmp_path: Path) -> None:
    root = make_energon(tmp_path / "set", 4, 10)
    parts = {f"{n:06d}": sample_parts(n) for n in range(4)}
    # Same sizes, so that the index still fits: a broken image, and a control token in a text.
    parts["000001"]["jpg"] = b"\0" * len(parts["000001"]["jpg"])
    text = parts["000000"]["json"]
    parts["000000"]["json"] = text.replace(b"What", b"</s>", 1).replace(b"What", b"</s>", 1)
    write_tar(root / "000000.tar", members(parts))
    with pytest.raises(InputError, match=r"000000\.tar/000001: .*unreadable image") as caught:
        run(hf_dir, root, tmp_path / "out")
    assert "000000.tar/000000: control token '</s>'" in str(caught.value)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["refused"] == 2 and report["usable"] == 2


def test_a_sample_that_is_too_long_is_named(hf_dir: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than seq_length 40") as caught:
        run(hf_dir, dataset, tmp_path, seq_length=40)
    assert caught.value.exit_code == 3 and "report.json" in str(caught.value)


def test_samples_cut_to_max_turns_are_named(hf_dir: Path, dataset: Path, tmp_path: Path) -> None:
    blend = tmp_path / "blend.yaml"
    blend.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n"
        f"    blend_epochized: [{{path: {dataset}, subflavors: {{max_turns: 1}}}}]\n"
    )
    found = run(hf_dir, blend, tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert found["truncated"] == len(report["truncated_samples"]) == SAMPLES // 5
    assert all(".tar/" in name for name in report["truncated_samples"])


def test_samples_cut_to_seq_length_are_named_and_pass(hf_dir: Path, tmp_path: Path) -> None:
    root = make_energon(tmp_path / "set", SAMPLES, 10)
    limit = max(
        len(ConversationEncoder(hf_dir, 512).encode(from_parts("0", sample_parts(n)).turns).tokens)
        for n in range(SAMPLES)
    )
    with pytest.raises(InputError, match="set too_long to truncate"):
        run(hf_dir, root, tmp_path / "refused", seq_length=limit - 1)
    found = run(hf_dir, root, tmp_path / "out", seq_length=limit - 1, too_long="truncate")
    assert 0 < found["truncated"] < SAMPLES and found["usable"] == SAMPLES
    assert found["lengths"]["max"] < limit


def without_end(item: Encoded, encoder: ConversationEncoder) -> Encoded:
    labels = item.shifted_labels.clone()
    labels[labels == encoder.end_ids[0]] = -100
    return replace(item, shifted_labels=labels)


def with_image(item: Encoded, encoder: ConversationEncoder) -> Encoded:
    labels = item.shifted_labels.clone()
    place = int((item.tokens == encoder.image_token_id).nonzero()[3])
    labels[place - 1] = encoder.image_token_id
    return replace(item, shifted_labels=labels)


def not_shifted(item: Encoded, encoder: ConversationEncoder) -> Encoded:
    return replace(item, shifted_labels=item.shifted_labels.roll(1))


def everything(item: Encoded, encoder: ConversationEncoder) -> Encoded:
    return replace(item, shifted_labels=torch.cat((item.tokens[1:], torch.tensor([-100]))))


def padding(item: Encoded, encoder: ConversationEncoder) -> Encoded:
    labels, tokens = item.shifted_labels.clone(), item.tokens.clone()
    place = int((labels != -100).nonzero()[0])
    labels[place] = tokens[place + 1] = encoder.pad_id
    return replace(item, tokens=tokens, shifted_labels=labels)


def one_token_less(item: Encoded, encoder: ConversationEncoder) -> Encoded:
    place = int((item.tokens == encoder.image_token_id).nonzero()[0])
    kept = torch.arange(len(item.tokens)) != place
    return replace(item, tokens=item.tokens[kept], shifted_labels=item.shifted_labels[kept])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_end, "0 of 1 answers are supervised up to an end token"),
        (with_image, "an image token is supervised"),
        (not_shifted, "a label is not the next token"),
        (everything, "an image token is supervised"),
        (padding, "a padding token is supervised"),
        (one_token_less, "15 image tokens for 1 images"),
    ],
)
def test_wrong_labels_and_image_tokens_are_named(
    hf_dir: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Encoded, ConversationEncoder], Encoded],
    said: str,
) -> None:
    """Sample 10, the first of the second tar, comes out of the encoder wrong."""
    right = ConversationEncoder.encode

    def encode(self: ConversationEncoder, turns: Any) -> Encoded:
        item = right(self, turns)
        question = turns[0].content
        return spoil(item, self) if question.endswith(" 10") else item

    monkeypatch.setattr(ConversationEncoder, "encode", encode)
    with pytest.raises(IntegrityError) as caught:
        run(hf_dir, dataset, tmp_path)
    assert caught.value.exit_code == 4
    assert "000001.tar/000010" in str(caught.value) and said in str(caught.value)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["sample"].rpartition("/")[2] for row in report["broken_samples"]} == {"000010"}


def test_colours_on_a_terminal(
    hf_dir: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    auditor = audit.Auditor(Corpus(dataset, "train", 0), hf_dir, 512)
    example = auditor.inspect(SampleRef(0, 2))
    assert example is not None
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    step.show([example])
    text = capsys.readouterr().err
    assert "\x1b[30;42mIt is a 2.</s>\x1b[0m" in text and "[[" not in text
