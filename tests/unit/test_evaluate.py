"""Evaluation: prompts and pixels are those of training, and answers are counted right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_steps import evaluate
from llava_steps.commands import chat
from llava_steps.conversion.build import build
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.sample import Turn
from llava_steps.evaluation import ask, score
from llava_steps.settings.conversion import HfModel
from llava_steps.settings.evaluation import Evaluation
from tests.helpers.chain import run_step
from tests.helpers.data_fixtures import fake_context, jpeg
from tests.helpers.hf_fixtures import (
    PARTS_TEMPLATE,
    STRING_TEMPLATE,
    make_text,
    make_tokenizer,
    make_tower,
)

TEMPLATES = {"demo": None, "text": STRING_TEMPLATE, "parts": PARTS_TEMPLATE}
TALK = [
    {"from": "human", "value": "<image>\nWhat digit is this?"},
    {"from": "gpt", "value": "It is 7."},
    {"from": "human", "value": "次の数字は何ですか？"},
    {"from": "gpt", "value": "次は8です。"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A built LLaVA directory for each chat template."""
    root = tmp_path_factory.mktemp("models")
    tower = make_tower(root / "tower")

    def model(name: str) -> Path:
        if not (root / name).exists():
            text = make_text(root / f"{name}-text", make_tokenizer(TEMPLATES[name]))
            build(tower, text, root / name, HfModel(vision_tower="", text_model=""))
        return root / name

    return model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One image, two images, text only, two rounds, and a record without a kind."""
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number, (30 + 9 * number, 40)))
    pair = [TALK[0] | {"value": "<image>\n<image>\nWhich is larger?"}, TALK[1]]
    records = [
        {"id": "a", "image": "0.jpg", "conversations": TALK[:2], "kind": "what", "lang": "en"},
        {"id": "b", "image": ["1.jpg", "2.jpg"], "conversations": pair, "kind": "two"},
        {"id": "c", "conversations": TALK[2:], "kind": "what", "lang": "ja"},
        {"id": "d", "image": "2.jpg", "conversations": TALK, "kind": "what", "lang": "en"},
        {"id": "e", "image": "1.jpg", "conversations": TALK[:2]},
    ]
    path = tmp_path / "heldout.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_and_pixels_are_those_of_training(
    models: Callable[[str], Path], data: Path, template: str
) -> None:
    model, encoder = ask.Model(models(template)), ConversationEncoder(models(template), 256)
    for question in evaluate.read_questions(data):
        inputs = model.inputs([question])
        turns = [Turn(t["role"], t["content"]) for t in question.turns]
        encoded = encoder.encode([*turns, Turn("assistant", question.reference)])
        ids = inputs["input_ids"][0]
        assert torch.equal(encoded.tokens[: len(ids)], ids)
        # The next token is the first of the answer, and the answers before it are in the prompt.
        answer = encoded.shifted_labels[len(ids) - 1 :]
        said = model._processor.tokenizer.decode(answer[answer >= 0])
        assert said == f"{question.reference}</s>"
        if question.images:
            assert torch.equal(inputs["pixel_values"], encoder.images(question.images))
        else:
            assert "pixel_values" not in inputs


def test_answers_do_not_depend_on_the_batch(models: Callable[[str], Path], data: Path) -> None:
    model, questions = ask.Model(models("demo")), evaluate.read_questions(data)
    counted: list[int] = []
    together = model.answers(questions, 8, 5, counted.append)
    assert sum(counted) == len(questions) == len(together)
    for batch in (1, 2):
        assert model.answers(questions, batch, 5) == together
    assert len(set(together)) > 1
    assert model.answers([questions[3]], 1, 5) == [together[3]]


def test_answers_that_are_cut_are_known(models: Callable[[str], Path], data: Path) -> None:
    model, questions = ask.Model(models("demo")), evaluate.read_questions(data)
    long = [model.answers([question], 1, 200)[0] for question in questions]
    # The untrained model never ends an answer; then each of its tokens ends one.
    assert all(reply.is_cut for reply in model.replies(questions, 8, 5))
    model.network.generation_config.eos_token_id = [
        *range(model.network.config.text_config.vocab_size)
    ]
    assert not any(reply.is_cut for reply in model.replies(questions, 8, 5))
    rows = score.some(questions, long, 1, cut={0})
    assert rows[0]["cut"] and not any("cut" in row for row in rows[1:])


def test_answers_are_what_transformers_generates(models: Callable[[str], Path], data: Path) -> None:
    """A user's own few lines, without any batching or padding."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    directory = models("demo")
    processor = AutoProcessor.from_pretrained(directory, backend="pil")
    model = LlavaForConditionalGeneration.from_pretrained(directory)
    image = Image.open(data.parent / "0.jpg")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What digit is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    questions = evaluate.read_questions(data)
    assert ask.Model(directory).answers(questions, 8, 5)[0] == expected
    image = str(data.parent / "0.jpg")
    pieces = list(chat.answer(directory, [Path(image)], "What digit is this?", 5))
    assert "".join(pieces) == expected.strip() and all(pieces)


def test_questions_of_a_file(data: Path) -> None:
    found = evaluate.read_questions(data)
    assert [q.id for q in found] == ["a", "b", "c", "d", "e"]
    assert [q.group for q in found] == ["what/en", "two", "what/ja", "what/en", "questions"]
    assert [len(q.images) for q in found] == [1, 2, 0, 1, 1]
    assert [len(q.turns) for q in found] == [1, 1, 1, 3, 1]
    assert found[3].reference == "次は8です。" and found[3].turns[1]["content"] == "It is 7."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": "missing.jpg"}, "record 1: .*missing.jpg"),
        ({"image": "../x.jpg"}, "record 1: image path outside"),
        ({"conversations": TALK[:1]}, "record 1: no last answer"),
        ({"image": None}, "record 1: wrong number of image placeholders"),
    ],
)
def test_a_sample_that_cannot_be_asked_is_an_error(
    data: Path, change: dict[str, Any], words: str
) -> None:
    records = json.loads(data.read_text())
    records[1] = records[0] | change
    data.write_text(json.dumps(records))
    with pytest.raises(InputError, match=words):
        evaluate.read_questions(data)
    data.write_text("[]")
    with pytest.raises(InputError, match="holds no questions"):
        evaluate.read_questions(data)


def test_only_the_whole_right_answer_counts(data: Path) -> None:
    questions = evaluate.read_questions(data)
    answers = [" It is 7.\n", "It is 7", "次は8です。", "次は9です。", "It is 7. It is 7."]
    found = score.by_kind(questions, answers)
    assert found == {
        "all": {"accuracy": 0.4, "questions": 5},
        "what/en": {"accuracy": 0.5, "questions": 2},
        "two": {"accuracy": 0.0, "questions": 1},
        "what/ja": {"accuracy": 1.0, "questions": 1},
        "questions": {"accuracy": 0.0, "questions": 1},
    }
    shown = score.some(questions, answers, 1)
    assert [s["id"] for s in shown] == ["a", "b", "c", "e"]
    assert [s["right"] for s in shown] == [True, False, True, False]
    assert shown[1]["answer"] == "It is 7" and shown[1]["reference"] == "It is 7."
    rows = score.table({"before": found, "after_stage2": found}).splitlines()
    assert [cell.strip() for cell in rows[0].split("|")[1:-1]] == [
        "questions", "number", "before", "after stage2",
    ]  # fmt: skip
    assert " ".join(rows[2].split()) == "| what/en | 2 | 50.0% | 50.0% |"
    assert " ".join(rows[-1].split()) == "| all | 5 | 40.0% | 40.0% |"


class Pupil:
    """Stands for a model whose directory's name says what it answers."""

    def __init__(self, directory: Path) -> None:
        self.known = {"before": 0, "after_stage2": 4}[directory.name]

    def answers(
        self, questions: list[ask.Question], batch: int, limit: int, advance: Callable[[int], None]
    ) -> list[str]:
        return [reply.text for reply in self.replies(questions, batch, limit, advance)]

    def replies(
        self, questions: list[ask.Question], batch: int, limit: int, advance: Callable[[int], None]
    ) -> list[ask.Reply]:
        advance(len(questions))
        texts = [q.reference if i < self.known else "?" for i, q in enumerate(questions)]
        return [ask.Reply(text, is_cut=text == "?") for text in texts]


def test_the_step_writes_results_of_every_given_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "Model", Pupil)
    out = tmp_path / "out"
    out.mkdir()
    given = {"data": data, "after_stage2": Path("after_stage2"), "before": Path("before")}
    context = fake_context(out, **given)
    settings = Evaluation(
        data=str(data), samples_shown=1, metrics=["rouge_l"], prompts=["What is it?"]
    )
    metrics = evaluate.run(context, settings)
    results = json.loads((out / "results.json").read_text())
    assert metrics == {"questions": 5, "results": results}
    assert results["before"]["all"]["accuracy"] == 0
    assert results["after_stage2"]["all"]["accuracy"] == 0.8
    assert results["after_stage2"]["what/ja"]["rouge_l"] == 1
    assert (out / "table.md").read_text() == score.tables(metrics["results"])
    samples = json.loads((out / "samples.json").read_text())
    assert [len(rows) for rows in samples.values()] == [4, 4]
    assert [len(row["images"]) for row in samples["before"]] == [1, 2, 0, 1]
    cut = [row.get("cut", False) for row in samples["after_stage2"]]
    assert cut == [False, False, False, True]
    generations = json.loads((out / "generations.json").read_text())
    assert [row["answers"]["before"] for row in generations] == ["?", "?", "?"]
    for row in [*samples["before"], *generations]:
        for name in row["images"]:
            assert Image.open(out / name).format == "JPEG"
    assert len({row["images"][0] for row in generations}) == 3
    assert list(metrics["results"]) == ["before", "after_stage2"]
    with pytest.raises(ConfigError, match="nothing to evaluate: give --before"):
        evaluate.run(fake_context(out, data=data), Evaluation(data=str(data)))


def test_on_the_command_line_and_in_chat(
    models: Callable[[str], Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = models("demo")
    flags = (f"--data={data}", f"--before={directory}", "--max-new-tokens=3", "--save-dir=out")
    run_step("evaluate", *flags, cwd=tmp_path)
    samples = json.loads((tmp_path / "out/samples.json").read_text())["before"]
    assert samples[0]["question"] == "<image>\nWhat digit is this?"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["metrics"]["results"]["before"]["all"]["questions"] == 5
    image = str(data.parent / "0.jpg")
    line = [str(directory), image, "What digit is this?", "--max-new-tokens=3"]
    assert chat.main(line) == 0
    assert capsys.readouterr().out.strip() == samples[0]["answer"].strip()
    assert chat.main([str(directory), "nowhere.jpg", "What?"]) == InputError.exit_code
    assert "nowhere.jpg is not a file" in capsys.readouterr().err
    assert chat.main([str(tmp_path), "What?"]) == InputError.exit_code
    assert "config.json is missing" in capsys.readouterr().err


def test_chat_says_what_it_cannot_use(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, image, note = str(models("demo")), tmp_path / "x.jpg", tmp_path / "note.jpg"
    image.write_bytes(jpeg(1))
    note.write_text("not an image")
    capsys.readouterr()  # of the model's making
    for line, said in (
        ([directory, str(note), "What?"], "note.jpg: unreadable image"),
        ([directory, str(image), "<image>What?"], "the question contains <image>"),
        ([directory, "What is an <image>?"], "the question contains <image>"),
    ):
        assert chat.main(line) == InputError.exit_code == 3
        told = capsys.readouterr()
        assert not told.out and said in told.err and told.err.count("\n") == 1


def test_models_that_are_not_whole_are_refused(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    broken = Path(shutil.copytree(models("demo"), tmp_path / "broken"))
    kept = load_file(broken / "model.safetensors")
    del kept["multi_modal_projector.linear_1.bias"]
    save_file(kept, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"broken: the files lack weights, .*linear_1\.bias"):
        ask.Model(broken)
    (broken / "config.json").unlink()
    with pytest.raises(InputError, match=r"broken is not a complete LLaVA model: config\.json"):
        ask.Model(broken)
    deaf = Path(shutil.copytree(models("demo"), tmp_path / "deaf"))
    (deaf / "chat_template.jinja").write_text("{% for m in messages %}.{% endfor %}")
    with pytest.raises(ConfigError, match="deaf: the chat template writes the image token neither"):
        ask.Model(deaf)
