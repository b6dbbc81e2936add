"""Mistakes in datasets, stages and sweeps: each is one line with file, line, key and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_steps.core.errors import ConfigError
from llava_steps.pipeline.rules import chain
from llava_steps.settings.config import Config
from llava_steps.settings.load import load

BASE = """\
standalone: true
hf_model: {vision_tower: a/b, text_model: c/d}
evaluation: {data: held.json}
datasets:
  one: {source: one.json}
  two: {source: two.json}
stages:
  stage1: {data: one, train: projector, train_steps: 100}
  stage2: {data: {one: 1, two: 3}, train: all, train_steps: 100}
"""

PART = "is not a part; parts are vision_tower, projector, language_model, or all of them: all"
WEIGHT = "expected a weight, a number above 0, or {repetitions: N}, got"
NAME = "a name has letters, digits, - and _, begins with a letter, and is at most 60 characters"
UNTRAINED = "megatron_checkpoint is the model before training"
DOTS = "a key in a section has dots, such as stages.stage2.lr"
FORM = "expected KEY: [VALUE, ...], or a list of {KEY: VALUE}, got"
KEPT = "needs checkpoints that are kept: set keep_every to a multiple of save_interval"
AT_50 = "{evaluate_kept: true, keep_every: 50, save_interval: 50}"
NEW = "{data: one, train: all}"

OF_STAGES = {
    "{stage1: {data: pretrian}}": "stage1.data: 'pretrian' is not a dataset; datasets are one, two",
    "{stage1: {data: [one, x]}}": "stage1.data: 'x' is not a dataset; datasets are one, two",
    "{stage1: {data: {one: 3, x: 1}}}": "stage1.data: 'x' is not a dataset; datasets are one, two",
    "{more: {train: all}}": "more.data: is missing; name one or several of one, two",
    "{stage1: {data: []}}": "stage1.data: is missing; name one or several of one, two",
    "{stage2: {data: 3}}": "stage2.data: expected the name of a dataset, a list of names, or",
    "{stage2: {data: [[one]]}}": "stage2.data: expected the name of a dataset, a list of names, or",
    "{stage2: {data: [one, one]}}": "stage2.data: names a dataset twice; give it repetitions",
    "{stage2: {data: {one: 0}}}": f"stage2.data.one: {WEIGHT} 0",
    "{stage2: {data: {one: -1}}}": f"stage2.data.one: {WEIGHT} -1",
    "{stage2: {data: {one: .inf}}}": f"stage2.data.one: {WEIGHT} inf",
    "{stage2: {data: {one: '3'}}}": f"stage2.data.one: {WEIGHT} '3'",
    "{stage2: {data: {one: half}}}": f"stage2.data.one: {WEIGHT} 'half'",
    "{stage2: {data: {one: yes}}}": f"stage2.data.one: {WEIGHT} True",
    "{stage2: {data: {one: null}}}": f"stage2.data.one: {WEIGHT} None",
    "{stage2: {data: {one: {weights: 2}}}}": "stage2.data.one.weights: unknown key; did you mean",
    "{stage2: {data: {one: {repetitions: 2}}}}": "stage2.data: some datasets have a weight and",
    "{stage2: {data: {one: {repetitions: 1.5}}}}": "stage2.data.one.repetitions: expected a whole",
    "{stage2: {data: {one: {weight: 2, repetitions: 3}}}}": "stage2.data.one: give weight or",
    "{stage2: {data: one, data_path: x}}": "stage2.data: names datasets of this file, data_path",
    "{stage2: {from: stgae1}}": f"stage2.from: 'stgae1' is not a stage; stages are stage1, stage2; "
    f"{UNTRAINED}",
    "{stage2: {from: stage2}}": f"stage2.from: the stage starts from itself; {UNTRAINED}",
    "{stage1: {from: stage2}, stage2: {from: stage1}}": "stage1.from: stages stage1, stage2 start",
    "{stage2: {from: [stage1]}}": "stage2.from: expected one text, got ['stage1']",
    "{stage2: {from: stage1, megatron_load_dir: x}}": "stage2.from: names a stage, megatron_load_",
    "{more: {data: one}}": "more: does not say what it trains; give train: projector, train:",
    "{stage2: {train: lm}}": f"stage2.train: 'lm' {PART}",
    "{stage2: {train: [projector, llm]}}": f"stage2.train: 'llm' {PART}",
    "{stage2: {train: [projector, all]}}": f"stage2.train: 'all' {PART}",
    "{stage2: {train: 3}}": "stage2.train: expected all, a part or a list of parts, got 3",
    "{stage2: {train: []}}": "stage2.train: trains nothing; name a part, or leave the stage out",
    "{stage2: {train: projector, freeze_lm: false}}": "stage2.train: projector and freeze_lm false "
    "contradict each other; leave one of them out",
    "{all: {train: all, freeze_lm: true}}": "all.train: vision_tower, projector, language_model "
    "and freeze_lm true contradict each other; leave one of them out",
    f'{{"stage 3": {NEW}}}': f"stage 3: {NAME}",
    f'{{"stage1.5": {NEW}}}': f"stage1.5: {NAME}",
    f"{{3rd: {NEW}}}": f"3rd: {NAME}",
    f"{{hf: {NEW}}}": "hf: hf_export is another rule; give the stage another name",
    f"{{megatron: {NEW}}}": "megatron: megatron_checkpoint is another rule; give the stage another",
    f"{{megatron_checkpoint: {NEW}}}": "megatron_checkpoint: megatron_checkpoint is another rule;",
    f"{{stage2_step50: {NEW}, stage2: {AT_50}}}": "stage2_step50: rules of the kept checkpoints of "
    "stage2 have this name; choose another",
    "{more: null}": "more: expected a section with keys, got nothing",
    "{all: null}": "all: expected keys of every stage, got None",
    "{stage2: {data: one, train: all, stage: 1}}": "stage2.stage: must be 2; leave the key out",
    "{more: {data: one, train: all, stage: 1}}": "more.stage: follows from train; leave the key",
    "{stage2: {start: stage1}}": "stage2.start: unknown key; ",
    "{stage2: {evaluate_kept: true}}": f"stage2.evaluate_kept: {KEPT} 1000 below train_steps 100",
    f"{{stage2: {AT_50}, all: {{train_steps: 50}}}}": f"stage2.evaluate_kept: {KEPT} 50 below",
    "{stage2: {export: maybe}}": "stage2.export: expected true or false, got 'maybe'",
}
"""What `stages` is in the file -> the message after `stages.`"""

OF_FILES = {
    "stages: [stage1]": "stages: expected a section with names, got ['stage1']",
    "stages: {stage1: null, stage2: null}": "stages: is empty; describe at least one",
    "stage3: {lr: 1}": "stage3: unknown key; describe it in stages, as stages: {stage3: ...}",
    "stage1: {lr: 1}\nstages: {stage1: {lr: 1}}": "stage1: is in stages too; describe it once",
    "datasets: [one, two]": "datasets: expected a section with names, got ['one', 'two']",
    "datasets: {three: a.json}": "datasets.three: expected a section with keys, got 'a.json'",
    "datasets: {three: {}}": "datasets.three: give source, the raw data, or path, a prepared",
    "datasets: {three: null}": "datasets.three: expected a section with keys, got nothing",
    "datasets: {three: {sauce: b}}": "datasets.three.sauce: unknown key; did you mean source?",
    "datasets: {three: {source: [a]}}": "datasets.three.source: expected one text, got ['a']",
    "datasets: {three: {source: a, part: 1/2}}": "datasets.three.part: unknown key; it is a key of",
    "datasets: {three: {source: a, path: b}}": "datasets.three.path: names a prepared dataset, to "
    "which source does not apply; leave one out",
    "datasets: {three: {source: a, tar_dir: b}}": "datasets.three.tar_dir: names tars that exist, "
    "to which source does not apply; leave one out",
    "datasets: {three: {tar_dir: b, question: c}}": "datasets.three.tar_dir: names tars that "
    "exist, to which question does not apply; leave one out",
    "energon_dataset: {tar_dir: b}\ndatasets: {one: {source: y}}": "energon_dataset.tar_dir: "
    "is the data of one dataset; set it there",
    "datasets: {three: {path: b, samples_per_shard: 3}}": "datasets.three.path: names a prepared "
    "dataset, to which samples_per_shard does not apply; leave one out",
    "datasets: {my data: {source: a}}": f"datasets.my data: {NAME}",
    "datasets: {v1.5: {source: a}}": f"datasets.v1.5: {NAME}",
    "datasets: {one: null}": "stages.stage1.data: 'one' is not a dataset; datasets are two",
    "tar_shards: {source: x}\ndatasets: {one: {source: y}}": "tar_shards.source: the section "
    "datasets describes the data too; make it a dataset there, or leave it out",
    "cluster: {runtime: {stage3_checkpoint: 10}}": "cluster.runtime.stage3_checkpoint: "
    "stage3_checkpoint is not a rule; rules are ",
    "cluster: {runtime: {checkpoint: long}}": "cluster.runtime.checkpoint: expected a whole number",
    "cluster: {jobs: {three_tar_shards: 3}}": "cluster.jobs.three_tar_shards: three_tar_shards is",
    "cluster: {jobs: {checkpoint: 3}}": "cluster.jobs: checkpoint is one job: only tar_shards can",
    "sweep: {stages.stage2.lrr: [1, 2]}": "sweep: stages.stage2.lrr: unknown key; did you mean lr?",
    "sweep: {lr: [1, 2]}": "sweep: lr: unknown key; it is a key of stages",
    "sweep: {stages.stage3.lr: [1]}": "sweep: stages.stage3.lr: 'stage3' is not a stage; stages",
    "sweep: {datasets.x.source: [a]}": "sweep: datasets.x.source: 'x' is not a dataset; datasets",
    "sweep: {stages.stage2: [{lr: 1}]}": "sweep: stages.stage2 is a section; vary keys in it, such",
    "sweep: {stages..lr: [1]}": "sweep: 'stages..lr' is not a key; write one with dots, such as",
    "sweep: {stage2.lr: []}": f"sweep.stage2.lr: expected a list of values, got []; {DOTS}",
    "sweep: {stage2.lr: 1e-5}": f"sweep.stage2.lr: expected a list of values, got 1e-05; {DOTS}",
    "sweep: {stages: {stage2: {lr: [1]}}}": "sweep.stages: expected a list of values, got {'stage",
    "sweep: {run: [a, b]}": "sweep: run belongs to the whole run; it cannot differ in variants",
    "sweep: {cluster.gres: [a]}": "sweep: cluster.gres belongs to the whole run; it cannot differ",
    "sweep: {stage2.lr: [1, 1]}": "sweep: makes the variant lr_1 twice",
    "sweep: {stage2.lr: [1], stages.stage2.lr: [2]}": "sweep: stages.stage2.lr: given twice",
    "sweep: {stage2.lr: ['1e-5', 1]}": "sweep: lr_1e-5: stages.stage2.lr: '1e-5' is text in YAML",
    "sweep: {stage2.train_steps: [9, -1]}": "sweep: train_steps_-1: stages.stage2.train_steps: ",
    "sweep: [stages.stage2.lr]": f"sweep: {FORM} ['stages.stage2.lr']",
    "sweep: [{}]": f"sweep: {FORM} [{{}}]",
    "sweep: 3": f"sweep: {FORM} 3",
}
"""A file -> the message about it."""

CASES = {f"stages: {text}": f"stages.{message}" for text, message in OF_STAGES.items()} | OF_FILES


def merged(folder: Path, *texts: str) -> Config:
    paths = [folder / f"{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return load(paths)


@pytest.mark.parametrize("text", CASES)
def test_a_mistake_is_one_line_with_its_file_and_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merged(tmp_path, BASE, text)
    head, line = str(caught.value).splitlines()
    assert head == "the configuration has a problem:"
    where, message = line.strip().split(": ", 1)
    assert message.startswith(CASES[text])
    # A dataset that is removed is missed where a stage names it.
    assert where == (
        f"{tmp_path}/0.yaml:8" if text == "datasets: {one: null}" else f"{tmp_path}/1.yaml:1"
    )


@pytest.mark.parametrize(
    "text", ["datasets: {tar_shards: {source: a}}", "datasets: {all: {path: a}}"]
)
def test_names_that_look_like_rules_and_are_not(tmp_path: Path, text: str) -> None:
    rules = chain(merged(tmp_path, BASE, text))
    assert len({rule.out for rule in rules.values()}) == len(rules)


def test_a_prepared_dataset_takes_the_place_of_raw_data(tmp_path: Path) -> None:
    path = "datasets: {one: {path: prepared}}"
    config = merged(tmp_path, BASE, path)
    assert config.dataset("one").path == "prepared" and not config.dataset("one").source
    config = merged(tmp_path, BASE, path, "datasets: {one: {source: raw, question: What}}")
    assert (config.dataset("one").path, config.dataset("one").source) == ("", "raw")
    assert config.dataset("one").question == "What"


def test_tars_that_exist_are_only_prepared(tmp_path: Path) -> None:
    config = merged(tmp_path, BASE, "datasets: {one: {tar_dir: tars, split: [1, 0, 0]}}")
    rules = chain(config)
    assert "one_tar_shards" not in rules and "two_tar_shards" in rules
    made = rules["one_energon_dataset"]
    assert made.upstream == ()
    assert getattr(made.settings, "tar_dir", "") == "tars"
    assert "one_energon_dataset" in rules["stage1_checkpoint"].upstream
    raw = "datasets: {one: {question: What, split: [1, 0, 0]}}"
    one = merged(tmp_path, BASE, raw, "datasets: {one: {tar_dir: tars}}").dataset("one")
    assert getattr(one, "tar_dir", "") == "tars" and getattr(one, "split", ()) == [1, 0, 0]
    back = merged(tmp_path, BASE, "datasets: {one: {tar_dir: t}}", "datasets: {one: {source: s}}")
    assert "one_tar_shards" in chain(back)
    former = BASE.partition("datasets:")[0] + "stage1: {}\nstage2: {train_steps: 9}\n"
    rules = chain(merged(tmp_path, former, "energon_dataset: {tar_dir: tars}"))
    assert "tar_shards" not in rules and "energon_dataset" in rules
    replaced = merged(tmp_path, former, "energon_dataset: {tar_dir: t}", "datasets: {a: {path: p}}")
    assert replaced.dataset_names == ["a"] and not replaced.energon_dataset.tar_dir


def test_resources_of_kept_checkpoints(tmp_path: Path) -> None:
    kept = f"stages: {{stage2: {AT_50}}}"
    cluster = "cluster: {runtime: {stage2_step50_export: 10, stage2_step50_evaluation: 20}}"
    assert {*merged(tmp_path, BASE, kept, cluster).cluster.runtime} <= {
        *chain(merged(tmp_path, BASE, kept))
    }
    with pytest.raises(ConfigError, match="stage2_step50_export is not a rule"):
        merged(tmp_path, BASE, cluster)
