"""Source fields that hold several paths: each is an input of its own."""

from pathlib import Path

import pytest

from llava_steps.core.errors import InputError
from llava_steps.settings import cli, paths
from llava_steps.settings.fields import StepConfig, source
from llava_steps.store.digest import Digests
from llava_steps.store.identity import identify
from llava_steps.store.step import Step


class Several(StepConfig):
    """Of a step that reads several things."""

    one: str = source("", "one file", optional=True)
    some: list[str] = source([], "files", optional=True)
    named: dict[str, str] = source({}, "files by name", optional=True)


def _inputs(config: Several, store: Path) -> dict[str, str]:
    store.mkdir(exist_ok=True)
    step = Step(name="several", config=Several, run=lambda ctx, cfg: {})
    found = identify(step, "llava_steps.settings.paths", config, Digests(store))
    return {key: item.digest for key, item in found.inputs.items()}


def test_every_path_is_an_input_by_its_content(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abcd"]
    for file in files:
        file.write_text(file.name)
    a, b, c, d = map(str, files)
    given = Several(one=a, some=[b, c], named={"x": d})
    before = _inputs(given, tmp_path / "store")
    assert [*before] == ["one", "some", "some.1", "named.x"]
    files[2].write_text("changed")
    after = _inputs(given, tmp_path / "store")
    assert {key for key in before if before[key] != after[key]} == {"some.1"}
    assert cli.parse(Several, cli.flags(given)) == given


def test_a_missing_one_of_several_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--named: .*gone does not exist"):
        _inputs(Several(named={"x": str(tmp_path / "gone")}), tmp_path / "store")


def test_paths_are_replaced_by_the_name_of_their_input() -> None:
    given = Several(one="a", some=["b", "c"], named={"x": "d"})
    assert [(item.key, item.text) for item in paths.given(given)] == [
        ("one", "a"),
        ("some", "b"),
        ("some.1", "c"),
        ("named.x", "d"),
    ]
    other = paths.replaced(given, {"some.1": "C", "named.y": "e", "one": "A"})
    assert other == Several(one="A", some=["b", "C"], named={"x": "d", "y": "e"})
