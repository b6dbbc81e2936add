"""Scores against definitions written out here, perplexity against transformers' own loss."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from llava_steps import evaluate
from llava_steps.conversion.build import build
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.evaluation import ask, metrics, perplexity, score
from llava_steps.evaluation.words import words
from llava_steps.settings.conversion import HfModel
from tests.helpers.data_fixtures import jpeg
from tests.helpers.hf_fixtures import make_text, make_tokenizer, make_tower


def question(*references: str, group: str = "g") -> ask.Question:
    turns = ({"role": "user", "content": "?"},)
    return ask.Question("q", group, turns, (), references[0], references)


def test_words_of_english_and_japanese() -> None:
    assert words("A cat's ＡＢＣ１２, café!") == ["a", "cat", "s", "abc12", "café"]
    assert words("猫が2匹、ソファー。") == [*"猫が", "2", *"匹ソファー"]
    assert words("日本語ABCです") == ["日", "本", "語", "abc", "で", "す"]
    assert words(" 。! ") == []


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The cat.", "cat"),
        ("Two  dogs!", "2 dogs"),
        ("1,000.5", "1,000.5"),
        ("Yes, it isn't", "yes it isnt"),
        ("isnt", "isnt"),
        ("猫です。", "猫です"),
        ("ＡＢＣ", "abc"),
        ("left-right", "left right"),
    ],
)
def test_answers_as_vqa_compares_them(text: str, plain: str) -> None:
    assert metrics.plain(text) == plain


@pytest.mark.parametrize("agreeing", range(11))
def test_vqa_accuracy_is_the_mean_over_all_leave_one_out_sets(agreeing: int) -> None:
    people = ["Yes."] * agreeing + ["no"] * (10 - agreeing)
    expected = [
        min(sum(p == "Yes." for p in others) / 3, 1) for others in itertools.combinations(people, 9)
    ]
    found = metrics.vqa_accuracy("yes", people)
    assert found == pytest.approx(sum(expected) / 10)


def test_vqa_accuracy_with_few_answers() -> None:
    assert metrics.vqa_accuracy("A cat", ["cat"]) == 1
    assert metrics.vqa_accuracy("dog", ["cat"]) == 0
    assert metrics.vqa_accuracy("cat", ["cat", "cat"]) == 1
    assert metrics.vqa_accuracy("cat", ["cat", "dog"]) == 0.5


def test_rouge_l_by_its_definition() -> None:
    def longest(a: list[str], b: list[str]) -> int:
        return max(
            size
            for size in range(len(a) + 1)
            for part in itertools.combinations(a, size)
            if any(part == other for other in itertools.combinations(b, size))
        )

    def expected(answer: str, references: list[str]) -> float:
        said = words(answer)
        common = [(longest(said, words(r)), len(words(r))) for r in references]
        precision = max(c / len(said) for c, _ in common)
        recall = max(c / n for c, n in common)
        down = recall + 1.44 * precision
        return 2.44 * precision * recall / down if down else 0

    cases = [
        ("a cat on the mat", ["the cat sat on a mat"]),
        ("猫がいる", ["黒い猫がソファにいる", "犬"]),
        ("nothing", ["at all"]),
        ("same words", ["Same words."]),
    ]
    for answer, references in cases:
        (found,) = metrics.score("rouge_l", [question(*references)], [answer])
        assert found == pytest.approx(expected(answer, references)), answer
    assert metrics.score("rouge_l", [question("a")], [""]) == [0]


def test_cider_by_its_definition() -> None:
    """CIDEr-D of Vedantam et al. 2015, equations 1 to 5, with n-grams clipped."""

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        found = words(text)
        return Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))

    everything = [
        ["a black cat on a red sofa", "the cat sleeps on a sofa"],
        ["two dogs run over the grass", "dogs run on the grass"],
        ["赤いソファの上の黒い猫", "黒い猫がソファで寝ている"],
    ]
    answers = ["a black cat on a sofa", "dogs on the red sofa", "黒い猫がいる"]

    rare = math.log(len(everything))

    def vector(text: str, n: int) -> dict[tuple[str, ...], float]:
        sets = [set().union(*(grams(r, n) for r in references)) for references in everything]
        known = Counter(g for found in sets for g in found)
        return {g: c * (rare - math.log(max(1, known[g]))) for g, c in grams(text, n).items()}

    def similar(answer: str, reference: str, n: int) -> float:
        a, b = vector(answer, n), vector(reference, n)
        norm = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
        dot = sum(min(a[g], b[g]) * b[g] for g in a if g in b)
        gap = max(len(words(answer)) - 1, 0) - max(len(words(reference)) - 1, 0)
        return (dot / norm if norm else 0) * math.exp(-(gap**2) / 72)

    def expected(answer: str, references: list[str]) -> float:
        pairs = [(reference, n) for reference in references for n in range(1, 5)]
        return 10 * sum(similar(answer, r, n) for r, n in pairs) / len(pairs)

    questions = [question(*references) for references in everything]
    found = metrics.score("cider", questions, answers)
    assert found == pytest.approx(
        [expected(a, r) for a, r in zip(answers, everything, strict=True)]
    )
    assert found[0] > 2 * found[1] > 0 and found[2] > 0


def test_groups_get_means_and_perplexity_over_their_tokens() -> None:
    questions = [question("x", group="a"), question("y", group="a"), question("z", group="b")]
    found = score.by_kind(questions, ["x", "?", "?"], {"m": [1, 0, 0.5]}, [(2, 4), (4, 2), (0, 1)])
    assert found["a"] == {
        "accuracy": 0.5, "questions": 2, "m": 0.5, "perplexity": pytest.approx(math.exp(1)),
    }  # fmt: skip
    assert found["b"]["perplexity"] == 1 and found["all"]["m"] == 0.5
    text = score.tables({"before": found})
    assert "\nm\n\n| questions" in text and "perplexity" in text and "2.718" in text


def test_a_metric_without_its_library_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LIBRARY", "not_installed_anywhere")
    metrics.check(["perplexity", "vqa_accuracy"])
    with pytest.raises(ConfigError, match=r"evaluation\.metrics: cider need not_installed.*pip"):
        metrics.check(["cider"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("metrics")
    text = make_text(root / "text", make_tokenizer(None))
    build(make_tower(root / "tower"), text, root / "model", HfModel(vision_tower="", text_model=""))
    return root / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number, (40, 30)))
    talk = [
        {"from": "human", "value": "<image>\nWhat digit is this?"},
        {"from": "gpt", "value": "It is 7."},
        {"from": "human", "value": "次は？"},
        {"from": "gpt", "value": "次は8です。"},
    ]
    people = [{"answer": "7"}, {"answer": "seven"}]
    records = [
        {"id": "one", "image": "0.jpg", "conversations": talk[:2], "answers": people},
        {"id": "talk", "image": "1.jpg", "conversations": talk, "answers": ["8"]},
        {"id": "text", "conversations": talk[2:]},
    ]
    path = tmp_path / "heldout.json"
    path.write_text(json.dumps(records))
    return path


def test_perplexity_is_that_of_transformers_own_loss(directory: Path, data: Path) -> None:
    """Each question alone, labels at the last answer by counting tokens of the prompt."""
    model, questions = ask.Model(directory), evaluate.read_questions(data)
    together = perplexity.surprise(model, questions, 8)
    assert perplexity.surprise(model, questions, 1) == [
        (pytest.approx(nll, rel=1e-5), n) for nll, n in together
    ]
    for asked, (nll, tokens) in zip(questions, together, strict=True):
        prompt = model.inputs([asked])
        processor = model._processor
        tail = processor.tokenizer(f"{asked.reference}</s>", add_special_tokens=False)["input_ids"]
        ids = torch.cat([prompt["input_ids"], torch.tensor([tail])], dim=1)
        labels = ids.clone()
        labels[:, : prompt["input_ids"].shape[1]] = -100
        pixels = {k: prompt[k] for k in ("pixel_values",) if k in prompt}
        with torch.inference_mode():
            loss = model.network(input_ids=ids, labels=labels, **pixels).loss
        assert tokens == len(tail)
        assert nll == pytest.approx(float(loss) * tokens, rel=1e-4)


def test_answers_of_several_people_are_read(data: Path) -> None:
    found = evaluate.read_questions(data)
    assert [q.references for q in found] == [("7", "seven"), ("8",), ("次は8です。",)]
    records = json.loads(data.read_text())
    records[0]["answers"] = [3]
    data.write_text(json.dumps(records))
    with pytest.raises(InputError, match="record 0: answers must be a list of texts"):
        evaluate.read_questions(data)


def test_prompts_ask_about_single_images(data: Path) -> None:
    found = evaluate.prompted(evaluate.read_questions(data), ["What?", "Why?"], 5)
    assert [q.turns[0]["content"] for q in found] == ["<image>\nWhat?", "<image>\nWhy?"] * 2
    assert [
        q.images[0] == (data.parent / f"{i // 2}.jpg").read_bytes() for i, q in enumerate(found)
    ]
    assert evaluate.prompted(evaluate.read_questions(data), ["What?"], 1) == found[:1]
    assert evaluate.prompted(evaluate.read_questions(data), [], 4) == []
