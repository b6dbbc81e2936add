"""The pages tell the truth where a machine can check it: links, modules, options, tables.

Their Snakemake commands are tried in tests/workflow/test_readme.py.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml

from llava_steps.core import errors
from llava_steps.pipeline.rules import chain
from llava_steps.settings.config import Config
from llava_steps.settings.load import load
from tests.helpers.chain import run_step

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("config/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
STEPS_PAGE = (ROOT / "docs/reference/steps.md").read_text(encoding="utf-8")


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists() and not anchor, f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_modules_and_make_targets_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in set(re.findall(r"python -m (llava_steps[\w.]*)", text)):
        assert importlib.util.find_spec(module), f"{page}: {module}"
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M))
    for named in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M):
        assert named in targets, f"{page}: make {named}"


def test_the_first_screens_show_the_seven_boxes_and_the_command() -> None:
    screen = "\n".join(STEPS_PAGE.splitlines()[:40])
    for number, box in enumerate(
        ("tar shards", "energon dataset", "HF model", "Megatron checkpoint", "stage 1 training",
         "stage 2 training", "HF export"), 1,
    ):  # fmt: skip
        assert re.search(rf"│ *{number} +{box} *│", screen), box
    assert "─▶ evaluation" in screen
    assert "\nmake demo\n" in "\n".join(README.splitlines()[:40])


def test_the_readme_is_short_and_in_short_sentences() -> None:
    assert len(README.splitlines()) <= 130
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    prose = "\n".join(line for line in prose.splitlines() if not re.match(r"[#|!]", line))
    text = re.sub(r"\]\([^)]*\)", "]", prose)
    sentences = [part.split() for part in re.split(r"[.?!](?:\*\*)?\s|\n", text) if part.strip()]
    assert sum(map(len, sentences)) / len(sentences) <= 18


def test_a_sentence_ends_its_source_line() -> None:
    """In running text of docs/; a list item, a table row and a generated part may hold several."""
    for page in ROOT.glob("docs/**/*.md"):
        text = page.read_text(encoding="utf-8").partition("<!-- keys: begin -->")[0]
        text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        for line in text.splitlines():
            if not re.match(r"[#|!<\s]|- |\d+\. ", line):
                assert not re.search(r"[a-z)`][.?!] [A-Z]", line), f"{page}: {line}"
                assert not line or line[-1] in ".:", f"{page}: {line}"


def test_the_table_of_boxes_is_the_pipeline() -> None:
    lines = re.findall(
        r"^\| *\d? *\| (`\w+`(?:, `\w+`)*) \| `python -m ([\w.]+)", STEPS_PAGE, flags=re.M
    )
    rows = [(rule, module) for rules, module in lines for rule in re.findall(r"\w+", rules)]
    tasks = ["lmms_eval={tasks: [mme]}", "llm_jp_eval_mm={tasks: {a: rougel}}"]
    rules = chain(load([ROOT / "config/config.yaml"], tasks))
    shown = {name: rule.module for name, rule in rules.items() if name not in
             ("demo_assets", "stage1_export")}  # fmt: skip
    assert dict(rows) == shown


def test_the_raw_sample_of_the_readme_can_be_sharded(tmp_path: Path) -> None:
    from PIL import Image

    (text,) = re.findall(r"^```json\n(.*?)^```", README, flags=re.M | re.S)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images/cat.jpg")
    (tmp_path / "train.json").write_text(text)
    result = run_step("shard_tars", "--source=train.json", "--save-dir=out", cwd=tmp_path)
    assert (tmp_path / "out/000000.tar").is_file() and "1 samples: 1 written" in result.stderr


def test_the_image_that_the_readme_asks_about_is_one_that_training_never_sees() -> None:
    from llava_steps.demo.scans import load_scans, split

    demo = load([ROOT / "config/config.yaml"]).demo_assets
    assert demo is not None
    _, held_out = split(load_scans().digits, demo.heldout_scans, demo.seed)
    (number,) = re.findall(r"raw/images/(\d+)\.jpg \"What digit is this\?\"", README)
    assert int(number) in held_out


def test_exit_codes_are_those_of_the_errors() -> None:
    page = (ROOT / "docs/reference/exit-codes.md").read_text(encoding="utf-8")
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.M)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert told == {0} | {k.exit_code for k in kinds if k is not errors.StepError}


def test_options_of_building_and_converting_lead_to_keys_that_exist() -> None:
    """The table of training options is made from the classes (tests/unit/test_options.py)."""
    page = (ROOT / "docs/reference/options.md").read_text(encoding="utf-8")
    sections = {k: f.annotation for k, f in Config.model_fields.items()}
    for section, key in re.findall(r"`(\w+)\.(\w+)`", page):
        if section in sections:
            assert key in getattr(sections[section], "model_fields", {}), f"{section}.{key}"


def test_shipped_configurations_name_the_schema() -> None:
    for path in (ROOT / "config").glob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert (path.parent / first.partition("$schema=")[2]).resolve().is_file()
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_nothing_of_a_machine_is_written_down() -> None:
    """No paths of a home, no hosts, in what decides what is installed."""
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/environment", ".ci/run"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            assert not re.search(r"https?://|file:|/home/|/root/|/opt/|index-url|find-links", line)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for line in pins:
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_recipes_that_the_page_lists_are_those_that_there_are() -> None:
    page = (ROOT / "docs/how-to/recipes.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w.-]+\.yaml)` \|", page, flags=re.M))
    there = {p.name for p in (ROOT / "config/recipes").glob("*.yaml")}
    assert listed == {name for name in there if "x8" not in name}
    assert {f"`{name}`" for name in there - listed} <= set(re.findall(r"`\w+\.yaml`", page))
