"""The released lmms-eval and llm-jp-eval-mm, with tasks whose data lie here.

Skipped unless the environment names a Python that has them:

    LLAVA_STEPS_LMMS_EVAL=~/lmms/bin/python LLAVA_STEPS_EVAL_MM=~/eval-mm/bin/python \\
        python -m pytest tests/unit/test_real_benchmarks.py
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_steps import llm_jp_eval_mm, lmms_eval
from llava_steps.conversion.build import build
from llava_steps.core.errors import InputError
from llava_steps.evaluation import ask
from llava_steps.settings.conversion import HfModel
from llava_steps.store.run import execute
from tests.helpers.hf_fixtures import (
    PARTS_TEMPLATE,
    STRING_TEMPLATE,
    make_text,
    make_tokenizer,
    make_tower,
)

LMMS_EVAL, EVAL_MM = (
    os.environ.get(f"LLAVA_STEPS_{name}", "") for name in ("LMMS_EVAL", "EVAL_MM")
)
needs_lmms_eval = pytest.mark.skipif(not LMMS_EVAL, reason="LLAVA_STEPS_LMMS_EVAL names no Python")
needs_eval_mm = pytest.mark.skipif(not EVAL_MM, reason="LLAVA_STEPS_EVAL_MM names no Python")
COLOURS = ("red", "green", "blue", "white", "black")
TASK = """\
task: {name}
tag: all_here
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: !function utils.question
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """\
import io
from PIL import Image

def images(doc):
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in doc["images"]]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


def make_model(root: Path, template: str | None) -> Path:
    text = make_text(root / "text", make_tokenizer(template))
    build(make_tower(root / "tower"), text, root / "model", HfModel(vision_tower="", text_model=""))
    return root / "model"


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return file.getvalue()


def questions(images: int) -> list[ask.Question]:
    """One a colour, in two languages."""
    found = []
    for number, colour in enumerate(COLOURS):
        text = ("What colour is it?", "何色ですか?")[number % 2]
        turns = ({"role": "user", "content": "<image>\n" * images + text},)
        found.append(ask.Question(str(number), "q", turns, (png(colour),) * images, colour))
    return found


def add_task(tasks: Path, name: str, asked: list[ask.Question], answers: list[str]) -> None:
    tasks.mkdir(exist_ok=True)
    (tasks / "utils.py").write_text(UTILS)
    (tasks / f"{name}.yaml").write_text(TASK.format(name=name, data=tasks / f"{name}.parquet"))
    rows = [
        {"images": list(one.images), "question": one.turns[0]["content"].replace("<image>\n", ""),
         "answer": answer}
        for one, answer in zip(asked, answers, strict=True)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tasks / f"{name}.parquet")


@needs_lmms_eval
@pytest.mark.parametrize("template", [None, STRING_TEMPLATE, PARTS_TEMPLATE])
def test_lmms_eval_gets_the_answers_that_evaluate_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    path = make_model(tmp_path, template)
    model = ask.Model(path)
    answers, expected = {}, {}
    for name, images in (("one", 1), ("two", 2)):
        asked = questions(images)
        answers[name] = model.answers(asked, 1, 6)
        # What stands around an answer, lmms-eval removes.
        answers[name] = [text.strip() for text in answers[name]]
        right = [*answers[name][:3], "no", "no"]
        expected[name] = sum(a == b for a, b in zip(answers[name], right, strict=True)) / 5
        add_task(tmp_path / "tasks", name, asked, right)
    line = [f"--model={path}", f"--task-files={tmp_path / 'tasks'}", f"--python={LMMS_EVAL}"]
    save = tmp_path / "a place" / "out"
    assert execute(lmms_eval.STEP, [*line, f"--save-dir={save}", "--tasks", "all_here"]) == 0
    told = json.loads((save / "scores.json").read_bytes())
    for name in answers:
        (file,) = (save / "raw").rglob(f"*_samples_{name}.jsonl")
        rows = [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
        rows.sort(key=lambda row: int(row["doc_id"]))
        assert [row["filtered_resps"] for row in rows] == answers[name]
    assert {row["task"]: row["value"] for row in told["scores"]} == pytest.approx(expected)
    for written in tmp_path.rglob("*"):
        assert not written.is_file() or b"hf_planted" not in written.read_bytes(), written


@needs_lmms_eval
def test_what_lmms_eval_could_not_answer_or_find_is_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make_model(tmp_path, PARTS_TEMPLATE)
    add_task(tmp_path / "tasks", "words", questions(0), list(COLOURS))
    line = [f"--model={path}", f"--task-files={tmp_path / 'tasks'}", f"--python={LMMS_EVAL}"]
    for task, message in (
        ("words", "could not answer 5 of its questions"),
        ("nosuch", "Tasks not found: nosuch"),
    ):
        given = [*line, f"--save-dir=out/{task}", "--tasks", task]
        assert execute(lmms_eval.STEP, given) == InputError.exit_code
        assert message in capfd.readouterr().err


@needs_eval_mm
def test_llm_jp_eval_mm_scores_the_answers_that_evaluate_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its `datasets` takes a folder of that name for a data set of the hub."""
    path = make_model(tmp_path, STRING_TEMPLATE)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "SakanaAI/JA-VG-VQA-500"
    place.mkdir(parents=True)
    text = "何色ですか?"
    rows = [
        {"image_id": number, "image": {"bytes": png(colour), "path": colour},
         "qas": [{"qa_id": number, "question": text, "answer": colour}]}
        for number, colour in enumerate(COLOURS)
    ]  # fmt: skip
    number, words = ({"dtype": kind, "_type": "Value"} for kind in ("int64", "string"))
    question = {"qa_id": number, "question": words, "answer": words}
    features = {"image_id": number, "image": {"_type": "Image"}, "qas": [question]}
    told = json.dumps({"info": {"features": features}})
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": told})
    pq.write_table(table, place / "test-0.parquet")
    line = [f"--model={path}", f"--python={EVAL_MM}", "--limit=99", "--max-new-tokens=6"]
    tasks = "--tasks=ja-vg-vqa-500=exact-match,substring-match,rougel"
    assert execute(llm_jp_eval_mm.STEP, [*line, tasks, f"--save-dir={tmp_path / 'out'}"]) == 0
    file = tmp_path / "out/raw/ja-vg-vqa-500.jsonl"
    rows = [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
    turns = ({"role": "user", "content": f"<image>\n{text}"},)
    asked = [ask.Question("", "", turns, (png(colour),), "") for colour in COLOURS]
    assert [row["answer"] for row in rows] == ask.Model(path).answers(asked, 1, 6)
    assert [row["reference"] for row in rows] == list(COLOURS)
    scores = json.loads((tmp_path / "out/scores.json").read_bytes())["scores"]
    exact = sum(row["answer"] == row["reference"] for row in rows) / 5
    assert {row["metric"]: row["value"] for row in scores}["exact-match"] == exact
    assert {row["metric"] for row in scores} == {"exact-match", "substring-match", "rougel"}
    judge = "--tasks=ja-vg-vqa-500=llm-as-a-judge"
    assert execute(llm_jp_eval_mm.STEP, [*line, judge, f"--save-dir={tmp_path / 'judged'}"]) != 0
    assert "needs a judge: set llm_jp_eval_mm.judge_model" in capfd.readouterr().err
