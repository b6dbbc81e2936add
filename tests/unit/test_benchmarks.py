"""lmms-eval and llm-jp-eval-mm, with packages that stand in for them and local tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hf_fixtures import make_text, make_tokenizer, make_tower

from llava_steps import llm_jp_eval_mm, lmms_eval
from llava_steps.core.config import HfModel, LmmsEval
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.core.run import execute
from llava_steps.evaluation import ask, harness
from llava_steps.model.build import build

STANDINS = Path(__file__).parents[1] / "standins"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    text = make_text(root / "text", make_tokenizer(None))
    build(make_tower(root / "tower"), text, root / "model", HfModel(vision_tower="", text_model=""))
    return root / "model"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, where Python finds the stand-ins as installed packages."""
    for name, version in (("lmms_eval", "0.7.3"), ("eval_mm", "0.5.0")):
        place = tmp_path / "site" / f"{name}-{version}.dist-info"
        place.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (place / "METADATA").write_text(metadata)
    monkeypatch.setenv("PYTHONPATH", f"{STANDINS}:{tmp_path / 'site'}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    rows = {"exact_match,none": 0.25, "exact_match_stderr,none": 0.05, "f1,strict": 3, "n": 4,
            "note,none": "text", "f1_stderr,strict": "N/A"}  # fmt: skip
    (tmp_path / "tasks/digits.json").write_text(json.dumps(rows))
    (tmp_path / "tasks/silent.json").write_text('{"submission,none": null}')
    return tmp_path


def lmms(model: Path, *tasks: str) -> int:
    line = [f"--model={model}", "--task-files=tasks", "--limit=3", "--save-dir=out"]
    return execute(lmms_eval.STEP, [*line, "--tasks", *tasks])


def test_scores_of_lmms_eval_are_those_that_it_wrote(model: Path, room: Path) -> None:
    assert lmms(model, "digits") == 0
    told = json.loads((room / "out/scores.json").read_bytes())
    assert told == {
        "harness": "lmms_eval",
        "version": "0.7.3",
        "scores": [
            {"task": "digits", "metric": "exact_match", "value": 0.25, "stderr": 0.05},
            {"task": "digits", "metric": "f1, strict", "value": 3.0, "stderr": None},
        ],
    }
    assert json.loads((room / "out/manifest.json").read_bytes())["metrics"] == told
    (wrote,) = (room / "out/raw").rglob("*_results.json")
    config = json.loads(wrote.read_bytes())["config"]
    assert config["model"] == "llava_hf" and config["limit"] == 3.0 and config["log_samples"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["broken"], "ended with code 1.*the stand-in was told to fail"),
        (["silent", "digits"], "gave no number for silent"),
    ],
)
def test_a_task_without_a_number_is_no_result(
    model: Path, room: Path, tasks: list[str], message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert lmms(model, *tasks) == InputError.exit_code
    assert re.search(message, capfd.readouterr().err, flags=re.S)
    assert not (room / "out/manifest.json").exists()


def test_llm_jp_eval_mm_asks_the_model_as_evaluate_does(model: Path, room: Path) -> None:
    line = [f"--model={model}", "--tasks=squares=characters", "--limit=2", "--save-dir=out"]
    assert execute(llm_jp_eval_mm.STEP, [*line, "--max-new-tokens=8"]) == 0
    rows = [json.loads(line) for line in (room / "out/raw/squares.jsonl").open()]
    assert [row["id"] for row in rows] == ["the red one", "the green one"]
    from llava_steps.evaluation.eval_mm_driver import question
    from tests.standins import eval_mm

    task = eval_mm.Squares(eval_mm.TaskConfig(2))
    asked = [question(task, "squares", doc) for doc in task.dataset]
    assert asked[0].turns[0]["content"] == "<image>\nWhat colour is it?"
    answers = ask.Model(model).answers(asked, 1, 8)
    assert [row["answer"] for row in rows] == answers
    told = json.loads((room / "out/scores.json").read_bytes())
    lengths = [len(answer) for answer in answers]
    assert told["harness"] == "eval_mm" and told["version"] == "0.5.0"
    assert {row["metric"]: row["value"] for row in told["scores"]} == {
        "characters": sum(lengths) / 2, "characters, most": max(lengths),
    }  # fmt: skip


def test_what_is_not_installed_is_told_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    for package, section in (("lmms_eval", "lmms_eval"), ("eval_mm", "llm_jp_eval_mm")):
        with pytest.raises(ConfigError, match=rf"{section}.tasks: .* has no {package} that works"):
            harness.find(package, section)
        with pytest.raises(ConfigError, match=rf"{section}.python: /none/python: .*No such file"):
            harness.find(package, section, "/none/python")


def test_a_comma_would_be_taken_apart() -> None:
    for given in ({"tasks": ["a,b"]}, {"tasks": ["a"], "model_args": {"dtype": "x,y"}}):
        with pytest.raises(ConfigError, match="holds a comma"):
            lmms_eval.arguments(LmmsEval.model_validate(given), Path("m"), Path("raw"), False)
    with pytest.raises(ConfigError, match=r"pretrained: .* holds a comma"):
        lmms_eval.arguments(LmmsEval(tasks=["a"]), Path("m,n"), Path("raw"), False)
    line = lmms_eval.arguments(LmmsEval(tasks=["a", "b"]), Path("/m"), Path("raw"), True)
    assert "--tasks=a,b" in line and "--device=cuda" in line
    assert "--model_args=pretrained=/m" in line and not [w for w in line if "limit" in w]
