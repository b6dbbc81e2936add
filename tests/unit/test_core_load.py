"""Configuration files: merged, checked, and every problem told with its key, file and line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest
import yaml

from llava_steps.core.errors import ConfigError
from llava_steps.pipeline import describe
from llava_steps.settings.config import Config
from llava_steps.settings.load import load
from llava_steps.settings.recipe import StageSection
from llava_steps.settings.steps import STEPS

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "config/config.yaml"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "overlay.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(*files: Path, arguments: Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(files, arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_shipped_configuration_is_a_demo_without_gpu() -> None:
    config = load([SHIPPED])
    assert config.run == "demo" and config.demo_assets is not None and not config.image
    assert (config.stages["stage1"].stage, config.stages["stage2"].stage) == (1, 2)
    assert config.stages["stage1"].world_size == config.stages["stage2"].world_size == 2
    assert config.stages["stage1"].tensor_model_parallel == 2, (
        "the default run reshards between stages"
    )
    assert config.stages["stage2"].tensor_model_parallel == 1
    assert config.stages["stage1"].freeze_lm and not config.stages["stage2"].freeze_lm
    assert config.stages["stage1"].precision == config.stages["stage2"].precision == "fp32"


def test_what_an_audit_has_from_its_stage_is_refused(write) -> None:
    text = problems(SHIPPED, write("audit:\n  samples: 5\n  seq_length: 9\n"))
    assert "audit: " in text and "seq_length is the stage's; set it in each stage" in text
    assert load([SHIPPED, write("audit: {samples: 5}\n")]).audit.samples == 5


def test_overlays_change_single_keys_in_order(write) -> None:
    one = write("stage2: {lr: 5.0e-4, train_steps: 900}\n", "one.yaml")
    two = write("stage2: {lr: 6.0e-4}\ndemo_assets:\n  image_size: 64\n", "two.yaml")
    config = load([SHIPPED, one, two], ["run=mine", "stage2={train_steps: 901}"])
    assert (config.run, config.stages["stage2"].lr, config.stages["stage2"].train_steps) == (
        "mine",
        6.0e-4,
        901,
    )
    assert config.demo_assets is not None and config.demo_assets.image_size == 64
    assert config.stages["stage2"].precision == "fp32"
    shipped = yaml.safe_load(SHIPPED.read_text())
    config = load([SHIPPED, two, SHIPPED])
    assert config.stages["stage2"].lr == shipped["stage2"]["lr"]


def test_a_section_can_be_switched_off(write) -> None:
    overlay = write(
        "demo_assets: null\ntar_shards: {source: a.json}\n"
        "hf_model: {vision_tower: a/b, text_model: c/d}\nevaluation: {data: b.json}\n"
    )
    assert load([SHIPPED, overlay]).demo_assets is None
    text = problems(SHIPPED, write("demo_assets: null\n"))
    assert "tar_shards.source: 'demo:raw/train.json' needs the section demo_assets" in text
    assert text.count("needs the section") == 4


def test_a_standalone_file_takes_nothing_from_the_demo(write) -> None:
    assert "stages: is missing" in problems(SHIPPED, write("standalone: true\nrun: mine\n"))
    text = "".join(row for row in SHIPPED.open() if "warmup_steps" not in row)
    whole = write("standalone: true\n" + text)
    assert load([SHIPPED, whole]).stages["stage1"].warmup_steps == 0
    assert "expected true or false" in problems(SHIPPED, write("standalone: maybe\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: '2e-5'", "stage2.lr: '2e-5' is text in YAML, not a number; write 2.0e-5"),
        ("lr: '0.1'", "stage2.lr: '0.1' is text in YAML, not a number; write 0.1"),
        ("lr: fast", "stage2.lr: expected a number, got 'fast'"),
        ("lr: .nan", "stage2.lr: "),
        ("lr: -1.0", "stage2.lr: Input should be greater than 0"),
        (
            "train_steps: '8'",
            "stage2.train_steps: '8' is text in YAML, not a whole number; write 8",
        ),
        ("train_steps: 8.0", "stage2.train_steps: expected a whole number, got 8.0; write 8"),
        ("train_steps: '1e3'", "stage2.train_steps: '1e3' is text in YAML"),
        ("train_steps: 1e3", "stage2.train_steps: expected a whole number, got 1000.0; write 1000"),
        ("lr: 1e999", "stage2.lr: "),
        ("freeze_lm: 'no'", "stage2.freeze_lm: expected true or false, got 'no'"),
        ("freeze_lm: 1", "stage2.freeze_lm: expected true or false, got 1"),
        ("name:", "stage2.name: has no value; write one after the colon, or leave the key out"),
        ("lr:", "stage2.lr: has no value"),
        ("name: 2024", "stage2.name: expected text, got 2024; put it in quotes: '2024'"),
        ("precision: fp8", "stage2.precision: Input should be 'bf16' or 'fp32', got 'fp8'"),
        ("train_stepps: 8", "stage2.train_stepps: unknown key; did you mean train_steps?"),
        ("zzzz: 8", "stage2.zzzz: unknown key; config/README.md lists the "),
        ("stage: 1", "stage2.stage: must be 2; leave the key out"),
        ("global_batch_size: 7", "stage2: global_batch_size 7 is not a multiple"),
        ("lr: 1.0\n  lr: 2.0", "stage2.lr: given twice (first on line 2)"),
        ("3: 1", "key '3' is not text"),
        ("<<: {lr: 1.0}", "'<<' is not supported"),
    ],
)
def test_each_mistake_is_told_with_its_place(write, text: str, message: str) -> None:
    overlay = write(f"stage2:\n  {text}\n")
    told = problems(SHIPPED, overlay)
    line = next(row for row in told.splitlines() if message in row)
    assert f"{overlay}:" in line


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2e-5", 2e-5),
        ("2E-5", 2e-5),
        ("2.0e-5", 2e-5),
        ("2.e-5", 2e-5),
        (".5e2", 50.0),
        ("+1e5", 1e5),
        ("1.5e3", 1500.0),
        ("0.25", 0.25),
    ],
)
def test_floats_are_those_of_yaml_1_2(write, text: str, number: float) -> None:
    assert load([SHIPPED, write(f"stage2: {{lr: {text}}}\n")]).stages["stage2"].lr == number


@pytest.mark.parametrize(
    "text", ["e5", "1e", "1e5x", "2e-5-1", "1e-5e3", "--1e5", "2024e1-01", "0x1e5g", ".e5", "1_0e5"]
)
def test_words_with_an_e_stay_text(write, text: str) -> None:
    assert load([SHIPPED, write(f"stage2: {{name: {text}}}\n")]).stages["stage2"].name == text
    assert load([SHIPPED, write("stage2: {name: '1e5'}\n")]).stages["stage2"].name == "1e5"


def test_where_text_is_wanted_a_number_is_what_was_written(write) -> None:
    text = "stage2: {name: 1e3}\nlmms_eval: {tasks: [2E5, b], model_args: {1e3: 3e-1}}\n"
    config = load([SHIPPED, write(text)])
    assert config.stages["stage2"].name == "1e3" and config.lmms_eval.tasks == ["2E5", "b"]
    assert config.lmms_eval.model_args == {"1e3": "3e-1"}
    with pytest.raises(ConfigError, match=r"expected text, got 1\.0e\+3; put it in quotes"):
        load([SHIPPED, write("stage2: {name: 1.0e+3}\n")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 190:20:30", "stage2.lr: expected a number, got '190:20:30'"),
        ("lr: 1:30.5", "stage2.lr: expected a number, got '1:30.5'"),
        ("train_steps: 1:30", "stage2.train_steps: expected a whole number, got '1:30'"),
        ("train_steps: 017", "stage2.train_steps: '017' is text in YAML, not a whole number"),
        ("train_steps: 0o17", "stage2.train_steps: expected a whole number, got '0o17'"),
        ("lr: 2025-01-01", "stage2.lr: expected a number, got '2025-01-01'"),
        ("lr: on", "stage2.lr: expected a number, got on"),
        ("lr: ~", "stage2.lr: has no value"),
        ("name: 1e3x: 2", "is not valid YAML"),
        ("name: true", "stage2.name: expected text, got true; put it in quotes: 'true'"),
        ("name: !!int x", "is not valid YAML"),
        ("name: !!bool x", "is not valid YAML"),
    ],
)
def test_scalars_that_yaml_1_1_reads_otherwise(write, text: str, message: str) -> None:
    assert message in problems(SHIPPED, write(f"stage2:\n  {text}\n"))


TEXTS = ["001", "0o17", "1_000", "0b11", "2025-01-01", "1:30", "no", "Off", "yes", "=", "1_0.5"]
"""Texts in YAML 1.1 or in YAML 1.2, though not in both."""


@pytest.mark.parametrize("text", TEXTS)
def test_where_text_is_wanted_a_word_is_what_was_written(write, text: str) -> None:
    values = f"{{tasks: [{text}], model_args: {{{text}: {text}}}}}"
    for config in (
        load([SHIPPED, write(f"stage2: {{name: {text}}}\nlmms_eval: {values}\n")]),
        load([SHIPPED], [f"stage2={{name: {text}}}", f"lmms_eval={values}"]),
    ):
        assert config.stages["stage2"].name == text and config.lmms_eval.tasks == [text]
        assert config.lmms_eval.model_args == {text: text}


def test_switches_and_grouped_digits_keep_their_meaning(write) -> None:
    text = "stage2: {freeze_lm: yes, deterministic: off, train_steps: 1_000, seed: 0x1F}\n"
    stage = load([SHIPPED, write(text)]).stages["stage2"]
    assert stage.freeze_lm is True and stage.deterministic is False
    assert (stage.train_steps, stage.seed) == (1000, 31)


def test_values_of_the_command_line_are_those_of_a_file() -> None:
    config = load(
        [SHIPPED],
        [
            "stage2={lr: 2e-5, freeze_lm: true, name: '7'}",
            "energon_dataset={split: [8, 1, 1]}",
            'stage1={"lr": 3E-4}',
            "stage2={lr: 3e-5}",
            "demo_assets=null",
            "cluster={jobs: {tar_shards: 2}}",
            "tar_shards={source: a, question: q}",
            "hf_model={vision_tower: v, text_model: t}",
            "evaluation={data: d}",
        ],
    )
    assert (
        config.stages["stage2"].lr,
        config.stages["stage2"].freeze_lm,
        config.stages["stage2"].name,
    ) == (3e-5, True, "7")
    assert config.energon_dataset.split == [8, 1, 1] and config.stages["stage1"].lr == 3e-4
    assert config.demo_assets is None and config.cluster.jobs == {"tar_shards": 2}


@pytest.mark.parametrize(
    "text", ["2025", "001", "1e5", "1.50", "true", "null", "2025-01-01", "0x1"]
)
def test_text_on_the_command_line_is_as_it_was_written(text: str) -> None:
    assert load([SHIPPED], [f"run={text}"]).run == text
    assert load([SHIPPED], [f"run='{text}'"]).run == text
    assert load([SHIPPED], [f"stage2={{name: {text}}}"]).stages["stage2"].name == text
    assert load([SHIPPED], [f"lmms_eval={{tasks: [{text}]}}"]).lmms_eval.tasks == [text]


@pytest.mark.parametrize("text", ["a: b", "a #b", "{a: b}", "'a", "@x", "- a", "a: b: c"])
def test_signs_of_yaml_are_part_of_a_text_on_the_command_line(text: str) -> None:
    assert load([SHIPPED], [f"store={text}"]).store == text


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("store", "~/x"),
        ("store", "~"),
        ("store", "$HOME/x"),
        ("store", "${HOME}/x"),
        ("results", "~/x"),
        ("results", "$HOME/x"),
    ],
)
def test_a_path_that_a_shell_would_expand_is_refused(key: str, path: str) -> None:
    """Otherwise a directory of the name ~ would be made, which `rm -r` takes for another one."""
    expanded = path.replace("${HOME}", "~").replace("$HOME", "~").replace("~", str(Path.home()))
    shown = problems(SHIPPED, arguments=[f"{key}='{path}'"])
    assert f"{key}: ~ and $ are not expanded in a path; write {expanded}" in shown
    assert load([SHIPPED], [f"store='a{path}'"]).store == f"a{path}"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stage2={lr: '2e-5'}", "--config: stage2.lr: '2e-5' is text in YAML, not a number; write"),
        ("stage2={lr: 1, lr: 2}", "--config: stage2.lr: given twice"),
        ("stage2={lr: 1", "--config: stage2: '{lr: 1' is not valid YAML: expected ',' or '}'"),
        ("store=[a", "--config: store: '[a' is not valid YAML"),
        ("stage2=2e-5", "--config: stage2: expected a section with keys, got 2e-05"),
        ("stage2=", "--config: stage2: expected a section with keys"),
        ("run=", "--config: run: String should match pattern"),
        ("x=&a [*a]", "nested too deeply"),
    ],
)
def test_mistakes_on_the_command_line(argument: str, message: str) -> None:
    assert message in problems(SHIPPED, arguments=[argument])
    assert load([SHIPPED], ["image="]).image == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage2: {zzzz: 8}", f"lists the {len(StageSection.model_fields)} keys of stage2"),
        ("zzzz: 8", f"lists the {len(Config.model_fields) + 2} keys of a file"),
        ("lr: 8", "lr: unknown key; it is a key of stages"),
        ("stage2: {vision_tower: a}", "vision_tower: unknown key; it is a key of hf_model"),
        ("stage2: {train_step: 8}", "train_step: unknown key; did you mean train_steps?"),
        ("stage2: {freeze_l: 8}", "did you mean freeze_lm?"),
        ("lmms_eval: {zzzz: 8}", "lmms_eval.zzzz: unknown key; known keys: "),
        ("stage_1: {}", "stage_1: unknown key; did you mean stage1"),
    ],
)
def test_an_unknown_key_is_reported_with_what_may_be_meant(write, text: str, message: str) -> None:
    shown = problems(SHIPPED, write(text))
    assert message in shown
    assert len(shown) < 400


def test_all_problems_at_once_and_only_once(write) -> None:
    overlay = write("stage2: {lr: x}\nstage1: {lr: y}\ntypo: 1\nrun: 'a/b'\ntar_shards: 3\n")
    told = problems(SHIPPED, overlay)
    assert told.startswith("the configuration has 5 problems:")
    assert "tar_shards: expected a section with keys, got 3" in told
    assert "--config: stage1.lr" in problems(SHIPPED, arguments=["stage1={lr: '2e-5'}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- a\n", "expected keys and values"),
        ("a: !!python/object/apply:os.system ['touch canary']", "is not valid YAML"),
        ("a: &a\n  b: *a\n", "nested too deeply"),
    ],
)
def test_files_that_are_no_configuration(write, text: str, message: str) -> None:
    assert message in problems(SHIPPED, write(text))
    assert not Path("canary").exists()


def test_missing_and_binary_files(tmp_path: Path) -> None:
    assert "cannot be read" in problems(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problems(tmp_path / "binary.yaml")
    (tmp_path / "empty.yaml").touch()
    assert load([SHIPPED, tmp_path / "empty.yaml"]) == load([SHIPPED])


@pytest.mark.parametrize("path", ["demo:", "demo:/etc/passwd", "demo:../x", "demo:a/../../x"])
def test_demo_paths_stay_inside(write, path: str) -> None:
    assert "tar_shards.source" in problems(SHIPPED, write(f"tar_shards: {{source: '{path}'}}\n"))


def test_schema_and_tables_are_those_of_the_classes() -> None:
    schema_is_new = describe.SCHEMA.read_text(encoding="utf-8") == describe.schema()
    texts = [(page.read_text(encoding="utf-8"), made) for page, made in describe.pages()]
    assert len(texts) == 3
    assert schema_is_new and all(text == describe.renewed(text, made) for text, made in texts), (
        "config.schema.json and the tables of the pages are made from the settings classes; renew"
        " them with `make describe` (python -m llava_steps.pipeline.describe)"
    )


def test_schema_accepts_the_shipped_file_and_catches_typos() -> None:
    schema = yaml.safe_load(describe.schema())
    values = yaml.safe_load(SHIPPED.read_text())
    jsonschema.validate(values, schema)
    for wrong in ({"stage2": {"lr": "2e-5"}}, {"stage2": {"l": 1}}, {"typo": 1}, {"run": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_every_key_is_explained() -> None:
    table = describe.README.read_text(encoding="utf-8")
    for name in Config.model_fields:
        assert f"`{name}`" in table
    shipped = yaml.safe_load(SHIPPED.read_text())
    for section in shipped.values():
        for key in section if isinstance(section, dict) else ():
            assert f"| `{key}` |" in table


def test_jobs_can_be_told_of_every_rule(tmp_path: Path) -> None:
    asked = dict.fromkeys(STEPS, 7)
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"cluster": {"runtime": asked}}))
    assert load([SHIPPED, overlay]).cluster.runtime == asked
    overlay.write_text("cluster: {runtime: {stage3_checkpoint: 7}}")
    with pytest.raises(ConfigError, match="stage3_checkpoint is not a rule; rules are demo_assets"):
        load([SHIPPED, overlay])


def test_every_rule_takes_what_jobs_are_told_to_ask_for() -> None:
    texts = [path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk")]
    rules = [rule for text in texts for rule in re.split(r"^ *rule\b", text, flags=re.M)[1:]]
    jobs = [rule for rule in rules if "shell:" in rule]
    assert len(jobs) == 3 and all("**this_run.resources(" in rule for rule in jobs)
