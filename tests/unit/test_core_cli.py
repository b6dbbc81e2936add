"""Flags of a step: what `flags` writes, `parse` reads back to the same settings."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_steps import train
from llava_steps.core.errors import ConfigError
from llava_steps.geometry.families import TEXT_FAMILIES, VISION_FAMILIES
from llava_steps.settings import cli
from llava_steps.settings.conversion import HfExport, HfModel, MegatronCheckpoint
from llava_steps.settings.dataset import Audit, EnergonDataset, TarShards
from llava_steps.settings.demo_assets import DemoAssets
from llava_steps.settings.evaluation import Evaluation
from llava_steps.settings.fields import facts, flag_name, values, whole_of
from llava_steps.settings.load import sections
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import run

MODELS = [
    DemoAssets,
    TarShards,
    EnergonDataset,
    HfModel,
    MegatronCheckpoint,
    Stage,
    HfExport,
    Evaluation,
]

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
text = text.filter(lambda found: found != "--")  # refused, see below
number = st.floats(min_value=1e-300, max_value=1e300)


@given(text, text, text, st.dictionaries(text.filter(lambda t: "=" not in t), text, min_size=1))
@settings(deadline=None, max_examples=200)
def test_texts_survive(source: str, name: str, address: str, names: dict[str, str]) -> None:
    for given_ in (
        TarShards(source=source),
        Stage(name=name, master_addr=address, data_path=source),
        EnergonDataset(tar_dir=source, field_map=names),
        HfModel(vision_tower=source, text_model=name),
    ):
        assert cli.parse(type(given_), cli.flags(given_)) == given_


@given(
    number,
    st.integers(min_value=0, max_value=2**62),
    st.booleans(),
    st.lists(st.integers(min_value=0, max_value=99), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=200)
def test_numbers_and_switches_survive(lr: float, seed: int, switch: bool, split: list[int]) -> None:
    for given_ in (
        Stage(lr=lr, adam_eps=lr, seed=seed, freeze_lm=switch, freeze_vision=switch),
        EnergonDataset(split=split, seed=seed),
        HfModel(vision_tower="a", text_model="b", vision_feature_layer=-seed),
    ):
        assert cli.parse(type(given_), cli.flags(given_)) == given_


def test_two_dashes_alone_are_refused() -> None:
    with pytest.raises(ConfigError, match="name: argparse drops the value '--'"):
        cli.flags(Stage(name="--"))


def test_defaults_are_left_out_and_one_word_per_flag() -> None:
    assert cli.flags(DemoAssets()) == []
    line = cli.flags(Stage(stage=2, lr=2e-5, freeze_vision=False, tensor_model_parallel=1))
    assert line == ["--stage=2", "--no-freeze-vision", "--no-freeze-lm", "--lr=2e-05"]


@pytest.mark.parametrize("model", MODELS)
def test_roles_split_the_line_without_loss(model) -> None:
    required = {k: "x" for k, f in model.model_fields.items() if f.is_required()}
    whole = model(**required, seed=7)
    parts = [word for role in cli.ROLES for word in cli.flags(whole, (role,))]
    assert sorted(parts) == sorted(cli.flags(whole))
    assert all(word.startswith("--") for word in parts)


@pytest.mark.parametrize("model", MODELS)
def test_flags_are_distinct_and_explained(model) -> None:
    names = [flag_name(name, field) for name, field in model.model_fields.items()]
    assert len(set(names)) == len(names)
    assert all(field.description for field in model.model_fields.values())
    assert all(facts(field).role in cli.ROLES for field in model.model_fields.values())


@pytest.mark.parametrize("names", [{}, {"a=b": "c"}])
def test_names_that_a_flag_cannot_carry_are_refused(names: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="field_map"):
        cli.flags(EnergonDataset(field_map=names))


def test_wrong_values_name_their_flag() -> None:
    with pytest.raises(ConfigError, match="--lr"):
        cli.parse(Stage, ["--lr=-1"])
    with pytest.raises(ConfigError, match="global_batch_size 3"):
        cli.parse(Stage, ["--gpus=2", "--global-batch-size=3"])


@pytest.mark.parametrize(
    ("model", "line", "start"),
    [
        (Stage, "--lr=-1", "--lr: Input should be greater than 0"),
        (Stage, "--gpus=2 --global-batch-size=3", "--global-batch-size: global_batch_size 3 is"),
        (Stage, "--stage=2 --freeze-lm --freeze-projector", "--freeze-projector: all parts are"),
        (Stage, "--pad-to=budget", "--pad-to: pack_length and pad_to need packing"),
        (Stage, "--init --load-optim", "--init: init starts from random weights"),
        (Stage, "--fp8 --precision=fp32", "--fp8: fp8 needs precision bf16"),
        (Stage, "--lora-rank=4 --freeze-lm", "--lora-rank: "),
        (TarShards, "--source=a --part=3/2", "--part: part 3/2 is out of range"),
        (TarShards, "--source=a --remove-parts", "--remove-parts: remove_parts needs parts"),
    ],
)
def test_every_wrong_value_is_reported_with_its_flag(model, line: str, start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cli.parse(model, line.split())
    assert str(caught.value).startswith(start), caught.value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--train-step=5", "unrecognized arguments: --train-step=5; did you mean --train-steps"),
        ("--zzzz", "unrecognized arguments: --zzzz"),
        ("word", "unrecognized arguments: word"),
        ("--lr=x", "argument --lr: invalid float value: 'x'"),
        ("--stage=7", "argument --stage: invalid choice: 7"),
    ],
)
def test_a_wrong_flag_is_reported_without_all_others(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run.parser(train.STEP, "llava_steps.train").parse_args([line, "--save-dir=x"])
    assert ended.value.code == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"llava-steps train: error: {message}")
    assert last == "`llava-steps train --help` lists all flags"


@pytest.mark.parametrize("model", MODELS)
def test_help_says_what_a_flag_takes(model) -> None:
    parser = argparse.ArgumentParser()
    cli.add_flags(parser, model)
    for action in parser._actions:
        assert action.metavar != "STR"
        field = model.model_fields.get(action.dest)
        if field is not None and facts(field).role == "source" and field.annotation is str:
            assert action.metavar == "PATH"


def test_help_shows_defaults_as_they_are_typed() -> None:
    parser = argparse.ArgumentParser()
    cli.add_flags(parser, EnergonDataset)
    text = " ".join(parser.format_help().split())
    assert "(default: 9,1,0)" in text
    assert "(default: image=jpg,jpeg,png,webp context=json[question] answers=txt)" in text


@pytest.mark.parametrize("model", MODELS)
def test_help_shows_no_empty_default(model) -> None:
    parser = argparse.ArgumentParser()
    cli.add_flags(parser, model)
    for empty in ("(default: )", "(default: [", "(default: {", "(default: True", "(default: False"):
        assert empty not in parser.format_help()


def test_help_names_every_supported_family() -> None:
    shown = {name: HfModel.model_fields[name].description or "" for name in HfModel.model_fields}
    for family in TEXT_FAMILIES:
        assert family in shown["text_model"].lower()
    for family in VISION_FAMILIES:
        assert family.partition("_")[0] in shown["vision_tower"].lower()


def test_names_of_the_old_scripts() -> None:
    """Options that people know from the scripts this replaces."""
    line = (
        "-g 8 --node 1 --tp 4 --pp 2 --micro-batch-size 2 --global-batch-size 16 --stage 2 "
        "--freeze-lm --save-interval 2000 --log-interval 1 --name x --wandb --num-workers 4 "
        "--megatron-load-dir a --tokenizer-load-dir b --data-path c --master-addr h "
        "--master-port 1234 --rank 1 --backend gloo "
        "--skip-train-iteration-range 100-110 300-400"
    )
    found = cli.parse(Stage, line.replace("-g 8", "--gpus 8").split())
    assert (found.gpus, found.nodes, found.tensor_model_parallel) == (8, 1, 4)
    assert (found.pipeline_model_parallel, found.stage, found.freeze_lm) == (2, 2, True)
    assert found.skip_train_iteration_range == ["100-110", "300-400"]
    assert cli.parse(Stage, cli.flags(found)) == found


def test_every_switch_goes_both_ways() -> None:
    """Also --no-add-class-token, which argparse takes for the opposite of something."""
    parser = argparse.ArgumentParser()
    cli.add_flags(parser, Stage)
    switches = [n for n, field in Stage.model_fields.items() if field.annotation is bool]
    assert "no_add_class_token" in switches
    for name in switches:
        flag = flag_name(name, Stage.model_fields[name])
        assert vars(parser.parse_args([flag])) == {name: True}
        assert vars(parser.parse_args(["--no-" + flag.removeprefix("--")])) == {name: False}


def test_a_share_is_known_without_what_applies_to_the_whole() -> None:
    whole = TarShards(source="a", quarantine_limit=0.5)
    share = whole.model_copy(update={"part": "1/2"})
    assert (whole_of(share), whole_of(whole)) == (whole, None)
    assert set(values(whole)) - set(values(share)) == {"quarantine_limit"}
    assert values(share)["part"] == "1/2"


def test_facts_about_a_field_are_declared_beside_it() -> None:
    """A field is of the right kind, and its flag is the only one of that name."""
    short = [facts(field).short for field in Stage.model_fields.values() if facts(field).short]
    assert sorted(short) == ["-g", "-m", "-p", "-r"]
    for name, field in Audit.model_fields.items():
        assert not facts(field).of_stage or name in Stage.model_fields
    data = {
        name
        for _, model in sections()
        for name, field in model.model_fields.items()
        if facts(field).is_data
    }
    assert data == {"source", "chat_template", "data", "task_files"}
