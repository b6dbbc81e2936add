"""The comparison of a sweep's variants: figures, the best one, and texts that stay text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.pipeline.rules import chain
from llava_steps.reporting.scores import marks
from llava_steps.settings.comparison import Comparison
from llava_steps.settings.config import Config, Variant
from tests.helpers.chain import run_step
from tests.helpers.comparison_fixtures import Made, make_sweep
from tests.helpers.page import Page
from tests.helpers.report_fixtures import HOSTILE


def compare(root: Path, variants: dict[str, Made]) -> tuple[dict[str, Any], Page]:
    run_step("compare", "--title=s", *make_sweep(root, variants), "--save-dir=out", cwd=root)
    text = (root / "out/comparison.html").read_text(encoding="utf-8")
    return json.loads((root / "out/comparison.json").read_bytes()), Page(text)


def of_rate(accuracy: float, last_loss: float, lr: float) -> Made:
    settings = {"stages.stage2.lr": lr, "stages.stage2.train_steps": 60}
    return Made(accuracy, last_loss, settings)


def test_scores_and_losses_of_each_variant(tmp_path: Path) -> None:
    found, page = compare(
        tmp_path,
        {"lr_1e-5": of_rate(0.5, 0.4, 1e-5), "lr_2e-5": of_rate(0.75, 0.6, 2e-5)},
    )
    assert found["best"] == "lr_2e-5" and found["metric"] == "accuracy" and not found["as_good"]
    first, second = found["variants"]
    assert [row["best"] for row in found["variants"]] == [False, True]
    assert first["label"] == "lr_1e-5" and first["last_loss"] == 0.4
    assert first["settings"] == {"stages.stage2.lr": 1e-5, "stages.stage2.train_steps": 60}
    assert second["scores"]["all"] == {"accuracy": 0.75, "questions": 800}
    assert second["scores"]["which"]["accuracy"] == 0.375
    heads = [text for tag, text in page.cells if tag == "th"]
    assert "stage2.lr" in heads and "stage2.train_steps" not in heads, "only what differs"
    for text in ("1e-5", "2e-5", "50.0\u202f%", "75.0\u202f%", "37.5\u202f%", "0.4"):
        assert text in page.text, text
    # Equal for both: not marked. Of the differing ones the higher score, the lower loss.
    best = [text for _, text in page.cells if text.endswith("best")]
    assert best == ["0.4best", "lr_2e-5best", "75.0\u202f%best", "37.5\u202f%best"]


def test_a_stage_that_all_share_is_drawn_once(tmp_path: Path) -> None:
    rates = {"a": of_rate(0.5, 0.4, 1e-5), "b": of_rate(0.75, 0.6, 2e-5), "c": of_rate(0, 1, 1.0)}
    _, page = compare(tmp_path, rates)
    charts = {
        str(attrs["aria-label"]).partition(",")[0]
        for tag, attrs in page.tags
        if tag == "svg" and attrs["class"] == "chart"
    }
    assert charts == {"Stage 1", "Stage 2"}
    labels = [str(a["aria-label"]) for t, a in page.tags if t == "svg" and a["class"] == "chart"]
    assert [label.count(";") for label in labels] == [2, 2, 0], "loss, validation loss; stage 1"
    assert "all variants" in labels[2]
    assert page.text.index("Stage 2") < page.text.index("same for all") < page.text.index("Stage 1")


def test_equal_scores_are_decided_by_the_last_loss(tmp_path: Path) -> None:
    found, page = compare(
        tmp_path,
        {"a": of_rate(0.5, 0.4, 1e-5), "b": of_rate(0.5, 0.3, 2e-5), "c": of_rate(0.2, 0.1, 3e-5)},
    )
    assert found["best"] == "b" and not found["as_good"]
    assert "higher last loss" in page.text
    tied = [text for _, text in page.cells if text.endswith("tied")]
    assert tied.count("50.0\u202f%tied") == 2 and tied.count("25.0\u202f%tied") == 2


def test_variants_that_are_equal_are_not_marked(tmp_path: Path) -> None:
    found, page = compare(tmp_path, {"a": of_rate(0.5, 0.4, 1e-5), "b": of_rate(0.5, 0.4, 2e-5)})
    assert found["best"] == "a" and found["as_good"] == ["b"]
    assert not [text for _, text in page.cells if text.endswith(("best", "tied"))]
    assert marks("accuracy", [0.0, 0.0, 0.0]) == ["", "", ""]
    assert marks("perplexity", [3.0, None, 2.0]) == ["", "", "best"]


def test_texts_of_variants_are_text(tmp_path: Path) -> None:
    labels = [text.replace("=", "-").replace("\x00", "").replace("\ud800", "") for text in HOSTILE]
    rates = {
        label: Made(0.1 * number, 1.0, {HOSTILE[0]: HOSTILE[1], HOSTILE[2]: label})
        for number, label in enumerate(labels)
    }
    found, page = compare(tmp_path, rates)
    assert [row["label"] for row in found["variants"]] == labels
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "h1-big", "iframe"})
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    assert not [n for _, attributes in page.tags for n in attributes if n.startswith("on")]
    assert labels[0] in page.text and HOSTILE[2] in page.text


def test_a_run_names_the_last_stage_where_it_is_not_trained_last() -> None:
    stages = {
        "a": {"train": "all", "from": "b"},
        "b": {"train": "all", "from": "megatron_checkpoint"},
    }
    values = {
        "hf_model": {"vision_tower": "a/b", "text_model": "c/d"},
        "evaluation": {"data": "y.json"},
        "datasets": {"d": {"source": "x.json"}},
        "sweep": {"stages.a.lr": [1e-5, 2e-5]},
    }
    for named, last in ((["a", "b"], {"lr_1e-5": "b", "lr_2e-5": "b"}), (["b", "a"], {})):
        config = Config.model_validate(values | {"stages": {name: stages[name] for name in named}})
        rates = config.sweep["stages.a.lr"] if isinstance(config.sweep, dict) else []
        config.sweep_over(
            Variant({"stages.a.lr": rate}, _with_rate(config, rate)) for rate in rates
        )
        settings = chain(config)["comparison"].settings
        assert isinstance(settings, Comparison) and settings.last_stages == last
        assert list(settings.trainings) == [
            f"lr_{rate}/{stage}" for rate in ("1e-5", "2e-5") for stage in ("b", "a")
        ]


def _with_rate(config: Config, rate: float) -> Config:
    stages = dict(config.stages)
    stages["a"] = stages["a"].model_copy(update={"lr": rate})
    return config.model_copy(update={"stages": stages})


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    flags = make_sweep(tmp_path, {"a": of_rate(0.5, 0.4, 1e-5)})

    def refused(*changed: str) -> tuple[int, str]:
        done = run_step("compare", *changed, "--save-dir=no", cwd=tmp_path, check=False)
        assert done.returncode, done.stdout
        return done.returncode, done.stderr

    settings, last, evaluation, _, own = flags
    code, said = refused()
    assert code == ConfigError.exit_code and "--evaluations is needed" in said
    assert "no variants" in refused(evaluation)[1]
    assert "has no evaluation" in refused("--settings=b={}", *flags)[1]
    assert "'b' is not a variant" in refused(*flags, "--last-stages=b=stage2")[1]
    assert "VARIANT/STAGE" in refused(*flags, own.replace("a/stage2", "stage2"))[1]
    assert "is not JSON" in refused("--settings=a={", last, evaluation)[1]
    assert "expected {KEY: VALUE}" in refused("--settings=a=[]", last, evaluation)[1]
    assert "give --last-stages" in refused(settings, evaluation)[1]
    code, said = refused(settings, "--last-stages=a=stage3", evaluation)
    assert code == InputError.exit_code and "has no after_stage3" in said and "stage 3" in said
    training = own.rpartition("=")[2]
    code, said = refused(settings, last, f"--evaluations=a={training}")
    assert code == InputError.exit_code
    assert "this is the result of stage2_checkpoint, not of evaluation" in said
