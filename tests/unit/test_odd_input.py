"""What people give by mistake ends plan, summary, doctor and chat with a line that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from llava_steps.checks import partitions
from llava_steps.commands import chat, doctor, plan, summary
from llava_steps.core import errors
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.planning.models import model_of
from llava_steps.settings import load
from tests.helpers.chain import ROOT

LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 100,
         "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the shipped configuration and nothing computed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_bytes((ROOT / "config/config.yaml").read_bytes())
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], module: Any, *words: str) -> tuple[int, str]:
    """Exit code and the only lines on stderr."""
    code = module.main(list(words))
    return code, capsys.readouterr().err


def config_json(place: Path, content: Any) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return place


@pytest.mark.parametrize("module", [plan, doctor, summary])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mine.yaml cannot be read: no such file or directory; relative paths start at"),
        (b"deps: [a, b]\n", "mine.yaml:1: deps: unknown key"),
        (b"- a\n- b\n", "mine.yaml: expected keys and values"),
        (b"\x00\xff", "mine.yaml cannot be read"),
        (b"a: [1\n", "mine.yaml is not valid YAML"),
        (b"stage1: 5\n", "mine.yaml:1: stage1: expected a section"),
    ],
)
def test_files_that_are_no_configuration(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    content: bytes | None,
    message: str,
) -> None:
    if content is not None:
        (place / "mine.yaml").write_bytes(content)
    code, line = said(capsys, module, "--configfile", "mine.yaml")
    name = module.__name__.rpartition(".")[2]
    assert code == ConfigError.exit_code and line.startswith(f"{name}: ") and message in line


@pytest.mark.parametrize("module", [plan, doctor, summary])
def test_another_directory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, line = said(capsys, module)
    assert code == ConfigError.exit_code
    assert "config/config.yaml is missing; run this in the directory of the project" in line


def test_a_model_whose_store_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").symlink_to("../store/hf_export/0/config.json")
    code, line = said(capsys, chat, str(tmp_path), "What?")
    assert code == InputError.exit_code and "hf_export/0/config.json, which is gone" in line


@pytest.mark.parametrize(
    "flags",
    ["--search=0", "--search=-3", "--show=0", "--text-tokens=-5", "--efficiency=nan",
     "--efficiency=40", "--search=1 --gpu=none"],
)  # fmt: skip
def test_numbers_that_plan_cannot_use(
    place: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    code, line = said(capsys, plan, *flags.split())
    assert code == ConfigError.exit_code and line.count("\n") == 1 and flags[:5] in line


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("text_model", None, "hf_model.text_model: "),
        ("text_model", "[1]", "config.json does not hold a JSON object"),
        ("text_model", '{"model_type": ', "cannot be read"),
        ("text_model", LLAMA | {"vocab_size": "many"}, "vocab_size is 'many'"),
        ("text_model", LLAMA | {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (
            "vision_tower",
            {"model_type": "clip", "vision_config": 5},
            "vision_config is not a section",
        ),
        ("vision_tower", LLAMA, "'llama' is not supported"),
    ],
)
def test_models_that_plan_cannot_use(
    place: Path, capsys: pytest.CaptureFixture[str], key: str, content: Any, message: str
) -> None:
    if content is not None:
        config_json(place / "part", content)
    (place / "mine.yaml").write_text(f"hf_model: {{{key}: part}}\n")
    code, line = said(capsys, plan, "--configfile", "mine.yaml")
    assert code == InputError.exit_code and line.count("\n") == 1
    assert message in line and "part" in line


def test_a_model_of_other_settings_is_not_planned_with(place: Path) -> None:
    """What the run shows from before stands in only for a model of the same parts."""
    demo = load.with_overlays([])
    built = config_json(place / "results/demo/hf_model", {"text_config": LLAMA})
    other = load.load([load.SHIPPED], ["demo_assets={text_hidden_size: 64}"])
    assert model_of(other).geometry.hidden == 64 != model_of(demo).geometry.hidden
    with pytest.raises(InputError, match="hf_model"):  # `done`: this one, which is no LLaVA
        model_of(demo, done=True)
    gone = load.load([load.SHIPPED], ["hf_model={vision_tower: v, text_model: t}"])
    inputs = {"vision_tower": {"path": "v"}, "text_model": {"path": "other"}}
    manifest = {"format": 1, "content": "", "files": [], "inputs": inputs}
    (built / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="vision_tower: v is not a directory"):
        model_of(gone)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "model/config.json is missing"),
        ([3], "does not hold a JSON object"),
        ({}, "model_type"),
    ],
)
def test_directories_that_plan_is_given(
    place: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    if content is not None:
        config_json(place / "model", content)
    (place / "mine.yaml").write_text("stage2: {tokenizer_load_dir: model}\n")
    code, line = said(capsys, plan, "--configfile", "mine.yaml")
    assert code == InputError.exit_code and line.count("\n") == 1 and message in line


def test_why_no_layout_is_possible(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = said(capsys, plan, "--search=100000000")
    assert code == ConfigError.exit_code and line.count("\n") == 1
    assert "has no layout on 100000000 nodes: global_batch_size 64 is not a multiple" in line


@pytest.mark.parametrize("outlook", ["run", "after", "done"])
def test_plan_looks_at_the_built_model_only_when_it_is_the_one(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    outlook: Literal["run", "after", "done"],
) -> None:
    config_json(place / "results/demo/hf_model", {"text_config": LLAMA})
    state = plan.outlook.State("hf_model", outlook, "")
    monkeypatch.setattr(plan.outlook, "states", lambda *_: [state])
    assert plan.main(["--json"]) == (InputError.exit_code if outlook == "done" else 0)
    told = capsys.readouterr().out
    assert outlook == "done" or json.loads(told)["model"].startswith("demo:")


def test_places_that_are_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine.yaml").write_text("{store: config/config.yaml, results: config/config.yaml}\n")
    for module in (plan, summary):
        code, line = said(capsys, module, "--configfile", "mine.yaml")
        assert code == InputError.exit_code and "a part of this path is a file" in line


def test_a_bug_stays_a_traceback() -> None:
    with pytest.raises(RuntimeError, match="ours"):
        errors.report_error("plan", RuntimeError("ours"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation/results.json", '{"before": {"what_digit/en": {'),
        ("evaluation/results.json", '{"before": 5}'),
        ("evaluation/results.json", '{"before": {"what_digit/en": {}}}'),
        ("evaluation/results.json", "5"),
        ("demo_assets/raw/heldout.json", '[{"image"'),
        ("demo_assets/raw/heldout.json", "[5]"),
    ],
)
def test_results_that_are_damaged(
    place: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    for file, text in (
        ("evaluation/results.json", "{}"),
        ("evaluation/table.md", "table"),
        ("demo_assets/raw/heldout.json", "[]"),
        (name, content),
    ):
        (place / "results/demo" / file).parent.mkdir(parents=True, exist_ok=True)
        (place / "results/demo" / file).write_text(text)
    code, line = said(capsys, summary)
    assert code == InputError.exit_code and line.count("\n") == 1
    assert f"llava-steps verify results/demo/{name.split('/')[0]} " in line


def test_demo_images_are_named_only_where_there_are_some(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "results/demo"
    (out / "demo_assets/raw/images").mkdir(parents=True)
    (out / "evaluation").mkdir()
    (out / "evaluation/results.json").write_text("{}")
    (out / "evaluation/table.md").write_text("table")
    for samples in (None, "[]"):
        if samples:
            (out / "demo_assets/raw/heldout.json").write_text(samples)
        assert summary.main([]) == 0
        assert 'hf_export IMAGE "What' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"- a\n", "expected keys and values"),
        (b"", "expected keys and values"),
        (b"default-resources: 5\n", "expected resources, got 5"),
        (b"set-resources: {report: 5}\n", "expected resources, got 5"),
        (b"set-resources: 5\n", "set-resources: expected rules"),
    ],
)
def test_profiles_that_are_none(place: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (place / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="--profile config") as told:
        partitions.settings(Path("config.yaml"))
    assert message in str(told.value)


def test_profiles_may_list_their_resources(place: Path) -> None:
    """As Snakemake takes them too."""
    (place / "config.yaml").write_text(
        "default-resources: [runtime=240, slurm_partition=gpu]\n"
        "set-resources: ['report:runtime=20', 'report:mem_mb=100']\n"
    )
    assert partitions.settings(Path("config.yaml")) == {
        "default-resources": {"runtime": 240, "slurm_partition": "gpu"},
        "set-resources": {"report": {"runtime": 20, "mem_mb": 100}},
    }


def test_words_for_srun_and_apptainer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--srun", "--apptainer-args"):
        code, line = said(capsys, doctor, flag, "-A 'mine")
        assert code == ConfigError.exit_code and f'{flag} "-A \'mine": No closing' in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LLAMA, "model_type is 'llama'"),
        ({"model_type": "clip_vision_model"}, "model_type is 'clip_vision_model'"),
        ([1], "config.json does not hold a JSON object"),
        ('{"model_type": ', "cannot be read"),
        ({"model_type": "llava", "vision_config": {}}, "has no text_config"),
        ({"model_type": "llava", "text_config": LLAMA, "vision_config": 5}, "has no vision_config"),
        (None, "is missing"),
    ],
)
def test_directories_that_chat_cannot_ask(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: Any,
    message: str,
) -> None:
    """Before transformers makes a model of 7 billion random weights of it."""
    import transformers

    monkeypatch.setattr(transformers, "LlavaForConditionalGeneration", None)
    if content is not None:
        config_json(place / "model", content)
    code, line = said(capsys, chat, "model", "What?")
    assert code == InputError.exit_code and line.count("\n") == 1 and message in line


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--max-new-tokens=0", "What?"], 2, "--max-new-tokens 0"),
        (["config/config.yaml"], 2, "config/config.yaml is a file"),
        (["missing.jpg", "What?"], 3, "missing.jpg is not a file"),
        (["config", "What?"], 3, "config is not a file"),
        (["x" * 5000, "What?"], 3, "is not a file"),
        (["config/config.yaml", "What?"], 3, "config/config.yaml: unreadable image"),
        (["What <image> is it?"], 3, "contains <image>"),
    ],
)
def test_questions_that_chat_cannot_ask(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    config_json(place / "model", {"model_type": "llava"})
    found, line = said(capsys, chat, "model", *words)
    assert found == code and line.count("\n") == 1 and message in line


def test_ctrl_c_ends_an_answer(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> Any:
        yield "half an"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "answer", stopped)
    assert chat.main(["model", "What?"]) == 130
    assert capsys.readouterr() == ("half an\n", "")
