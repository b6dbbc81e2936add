"""lmms-eval and llm-jp-eval-mm, with packages that stand in for them and local tasks."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_steps import llm_jp_eval_mm, lmms_eval
from llava_steps.conversion.build import build
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.evaluation import ask, eval_mm_driver, harness, same_prompts
from llava_steps.settings.conversion import HfModel
from llava_steps.settings.evaluation import LmmsEval
from llava_steps.store.run import execute
from tests.helpers.hf_fixtures import (
    PARTS_TEMPLATE,
    STRING_TEMPLATE,
    make_text,
    make_tokenizer,
    make_tower,
)
from tests.helpers.patience import wait_for

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
    for name, version in (("lmms_eval", "0.7.3"), ("eval_mm", "0.4.1")):
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
    (tmp_path / "tasks/silent.json").write_text('{"submission,none": null, "f1,none": NaN}')
    for name in ("broken", "wordless"):
        (tmp_path / f"tasks/{name}.json").write_text('{"exact_match,none": 0.5}')
    (tmp_path / "tasks/both.json").write_text('["digits", "wordless_not"]')
    (tmp_path / "tasks/wordless_not.json").write_text('{"exact_match,none": 1}')
    return tmp_path


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness is found without a process that imports torch."""
    installed = harness.Harness("lmms_eval", sys.executable, "0.7.3", cuda=False)
    monkeypatch.setattr(harness, "find", lambda *given: installed)


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
        (["broken"], "wrote no results.*ERROR Error during evaluation: the stand-in was told to"),
        (["digit"], "wrote no results.*Tasks not found: digit"),
        (["silent", "digits"], "reported no number for silent"),
        (["wordless"], "could not answer 1 of its questions.*the stand-in has no words"),
    ],
)
def test_a_task_without_a_number_is_no_result(
    model: Path, room: Path, found: None, tasks: list[str], message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert lmms(model, *tasks) == InputError.exit_code
    assert re.search(message, capfd.readouterr().err, flags=re.S)
    assert not (room / "out/manifest.json").exists()


def test_groups_and_patterns_stand_for_their_tasks(model: Path, room: Path, found: None) -> None:
    assert lmms(model, "both", "digi*") == 0
    told = json.loads((room / "out/scores.json").read_bytes())
    assert {row["task"] for row in told["scores"]} == {"digits", "wordless_not"}


def test_lmms_eval_is_given_a_token_where_it_does_not_print_it(
    model: Path, room: Path, found: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", given := "hf_planted")
    assert lmms_eval.environment()["HUGGING_FACE_HUB_TOKEN"] == given
    assert lmms(model, "digits") == 0
    log = next(room.rglob("lmms_eval.log")).read_text()
    assert "'token': None" in log and "planted" not in log


@pytest.mark.parametrize(
    ("template", "changed"), [(None, True), (STRING_TEMPLATE, True), (PARTS_TEMPLATE, False)]
)
def test_lmms_eval_asks_in_the_words_of_the_chat_template(
    tmp_path: Path, template: str | None, changed: bool
) -> None:
    """As its llava_hf does it: contents as parts, then the text through the processor."""
    from transformers import AutoProcessor

    text = make_text(tmp_path / "text", make_tokenizer(template))
    source = HfModel(vision_tower="", text_model="")
    build(make_tower(tmp_path / "tower"), text, tmp_path / "model", source)
    given = same_prompts.directory(tmp_path / "model", tmp_path / "room")
    assert (given != tmp_path / "model") is changed
    processor = AutoProcessor.from_pretrained(given, backend="pil")
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "何色ですか?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    image = Image.new("RGB", (24, 24))
    ids = processor(images=[image] * 2, text=prompt, return_tensors="pt")["input_ids"]
    turns = ({"role": "user", "content": "<image>\n<image>\n何色ですか?"},)
    jpeg = tmp_path / "image.jpg"
    image.save(jpeg)
    question = ask.Question("1", "q", turns, (jpeg.read_bytes(),) * 2, "")
    own = ask.Model(tmp_path / "model").inputs([question])["input_ids"]
    assert ids.tolist() == own.tolist()
    assert (given / "model.safetensors").samefile(tmp_path / "model/model.safetensors")


def test_a_killed_step_takes_the_harness_with_it(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from llava_steps.evaluation import harness as h\n"
        "sleep = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "h.run(h.Harness('x', sys.executable, '1', False), ['-c', sleep], Path('log'))"
    )
    step = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    step.send_signal(signal.SIGKILL)
    step.wait()
    stat = Path("/proc", log.read_text().strip(), "stat")
    wait_for(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")


def test_llm_jp_eval_mm_asks_the_model_as_evaluate_does(model: Path, room: Path) -> None:
    line = [f"--model={model}", "--tasks=squares=mean-characters", "--limit=2", "--save-dir=out"]
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
    assert told["harness"] == "eval_mm" and told["version"] == "0.4.1"
    assert {row["metric"]: row["value"] for row in told["scores"]} == {
        "mean-characters": sum(lengths) / 2, "mean-characters, most": max(lengths),
    }  # fmt: skip


class Short:
    """Answers each question with one word."""

    def answers(self, questions: list[ask.Question], batch: int, tokens: int) -> list[str]:
        return ["word"] * len(questions)


def drive(room: Path, metric: str, limit: int, judge: str = "") -> dict[str, float]:
    """The numbers of the driver's one task, in this process."""
    job = {"raw": str(room), "limit": limit, "batch_size": 1, "max_new_tokens": 2,
           "judge_model": judge}  # fmt: skip
    rows = eval_mm_driver.run(job, Short(), "squares", [metric])
    return {row["metric"]: row["value"] for row in rows}


def test_a_limit_may_be_larger_than_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(STANDINS))
    for limit, count in ((2, 2), (9, 3), (0, 3)):
        assert drive(tmp_path, "mean-characters", limit)["mean-characters"] == 4
        assert len((tmp_path / "squares.jsonl").read_text().splitlines()) == count


def test_a_judge_that_says_nothing_gives_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(STANDINS))
    with pytest.raises(
        RuntimeError, match=r"judged needs a judge: set llm_jp_eval_mm\.judge_model"
    ):
        drive(tmp_path, "judged", 2)
    with pytest.raises(RuntimeError, match="judged: the judge gave no answer to 2 of 2 questions"):
        drive(tmp_path, "judged", 2, "mute")
    assert drive(tmp_path, "judged", 2, "gpt")["judged"] == 4


def test_what_is_not_installed_is_told_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    for package, section in (("lmms_eval", "lmms_eval"), ("eval_mm", "llm_jp_eval_mm")):
        with pytest.raises(ConfigError, match=rf"{section}.tasks: .* has no working {package}"):
            harness.find(package, section)
        with pytest.raises(ConfigError, match=rf"{section}.python: /none/python: .*No such file"):
            harness.find(package, section, "/none/python")


def test_a_comma_would_be_taken_apart() -> None:
    for given in ({"tasks": ["a,b"]}, {"tasks": ["a"], "model_args": {"dtype": "x,y"}}):
        with pytest.raises(ConfigError, match="contains a comma"):
            lmms_eval.arguments(LmmsEval.model_validate(given), Path("m"), Path("raw"), False)
    with pytest.raises(ConfigError, match=r"pretrained: .* contains a comma"):
        lmms_eval.arguments(LmmsEval(tasks=["a"]), Path("m,n"), Path("raw"), False)
    with pytest.raises(ConfigError, match=r"--save-dir or --store: .* contains a comma"):
        lmms_eval.arguments(LmmsEval(tasks=["a"]), Path("m"), Path("a,b/raw"), False)
    line = lmms_eval.arguments(LmmsEval(tasks=["a", "b"]), Path("/m"), Path("raw"), True)
    assert "--tasks=a,b" in line and "--device=cuda" in line and not [w for w in line if "lim" in w]
    assert "--model_args=pretrained=/m,device_map=cuda" in line
    given = LmmsEval(tasks=["a"], model_args={"device_map": "auto"})
    line = lmms_eval.arguments(given, Path("/m"), Path("raw"), True)
    assert "--model_args=pretrained=/m,device_map=auto" in line


def test_what_runs_in_the_python_of_a_harness_needs_only_its_packages() -> None:
    """That environment has torch and transformers, not what the rest of this project needs."""
    code = (
        "import sys\n"
        "from llava_steps.evaluation import ask, eval_mm_driver\n"
        "print(sorted({'pydantic', 'megatron'} & {*sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
