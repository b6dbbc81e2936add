"""200 hostile values in each text of the configuration, through all shells there are on the way.

A value is refused by name, or it is an argument of its step, letter by letter: through Snakemake's
shell, through the container's, and through srun, the shell behind it and the container's entry.
The commands are those of the rules; the programs that they call only note their arguments.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from snakemake.deployment import singularity
from snakemake.utils import format as snakemake_format

from llava_steps.core.errors import ConfigError
from llava_steps.pipeline import rules as pipeline_rules
from llava_steps.settings import cli, forms, load
from llava_steps.settings.config import Config
from tests.helpers.sections import sections
from tests.workflow.values import HOSTILE

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {
    "image": "docker://image@sha256:0",
    "cluster": {"gres": "gpu"},
    "tar_shards": {"source": "data.json"},
    "hf_model": {"vision_tower": "vision", "text_model": "text"},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2, "nodes": 2, "tensor_model_parallel": 2},
    "evaluation": {"data": "heldout.json"},
}
NOTE = """#!/bin/sh
for word; do printf '%s\\0' "$word"; done >>"$NOTES"
printf '\\0end\\0' >>"$NOTES"
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_PROCID=0 exec "$@"
"""
ENTER = """#!/bin/sh
# apptainer exec OPTIONS IMAGE COMMAND...
while [ "$1" != "docker://image@sha256:0" ]; do shift; done
shift
exec "$@"
"""


def texts() -> Iterator[tuple[str, str, str]]:
    """(section or nothing, key, kind) of every key of the configuration that holds text."""
    owners = [("", Config), *sections()]
    for section, model in owners:
        for key, info in model.model_fields.items():
            kinds = [info.annotation, *get_args(info.annotation)]
            if info.annotation is str:
                yield section, key, "text"
            elif str(info.annotation).startswith("list[") and "int" not in str(kinds[1]):
                if "Literal" not in str(kinds[1]):
                    yield section, key, "list"
            elif info.annotation == dict[str, str]:
                yield section, key, "names"


KEYS = list(texts())


def given(kind: str, value: str) -> Any:
    """The value in the form that a key of this kind takes."""
    return {"text": value, "list": [value], "names": {"n": value, value: "x"}}[kind]


def settled(values: dict[str, Any]) -> Config:
    """The configuration of one file."""
    return Config.model_validate(forms.canonical(values))


class Judge:
    """Whether a key takes a value, and whether its flag says just that value."""

    def __init__(self) -> None:
        self.sections = dict(sections())
        self.parsers = {}
        for name, model in self.sections.items():
            self.parsers[name] = cli.argparse.ArgumentParser(allow_abbrev=False)
            cli.add_flags(self.parsers[name], model)

    def takes(self, section: str, key: str, kind: str, value: str) -> bool:
        owner: type[BaseModel] = self.sections.get(section, Config)
        values = (BASE.get(section, {}) if section else BASE) | {key: given(kind, value)}
        try:
            found = owner.model_validate(values) if section else settled(values)
            if section in ("audit", "tar_shards"):
                settled(BASE | {section: values})
            if section in ("", "cluster"):
                return True
            line = cli.flags(found)
        except (ValidationError, ConfigError):
            return False
        back = cli.settings(owner, vars(self.parsers[section].parse_args(line)))
        assert back == found, f"{section}.{key}: {value!r} became {getattr(back, key)!r}"
        return True


def templates() -> dict[str, str]:
    """The shell command of the rules in each file."""
    found = {}
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        for rule in re.split(r"^ *rule\b *", path.read_text(), flags=re.M)[1:]:
            for shell in re.findall(r'shell:\n((?: *".*"\n)+)', rule):
                found[path.stem] = "".join(re.findall(r'"(.*)"', shell))
    return found


def commands(rules: dict[str, pipeline_rules.Rule], config: Config, page: Path) -> Iterator[str]:
    """What Snakemake hands to bash: stage 2 by itself, for srun; all others in the container."""
    inside = ["apptainer", "exec", "--home=/x", "--nv", "--cleanenv", config.image]
    alone = []
    for name, rule in rules.items():
        words = rule.command(config.cluster.gres, inside)
        params = {"command": words, "made": str(rule.out / "report.html")}
        line = snakemake_format(
            TEMPLATES["pages" if rule.page else "steps"],
            params=type("Params", (), params),
            output=type("Output", (), {"page": str(page)}),
        )
        if name == "stage2_checkpoint":
            yield line
        else:
            alone.append(line)
    prefixed = "set -euo pipefail; " + "\n".join(alone)
    yield singularity.shellcmd(config.image, prefixed, args="--nv", shell_executable="bash")


TEMPLATES = templates()


def test_reach_their_step_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(HOSTILE)) == len(HOSTILE) >= 200 and len(KEYS) > 50
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_ins = {"python": NOTE, "srun": SRUN, "apptainer": ENTER, "singularity": ENTER}
    for name, text in stand_ins.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    judge = Judge()
    taken: Counter[str] = Counter()
    for number, value in enumerate(HOSTILE):
        place = tmp_path / f"{number}"
        place.mkdir()
        monkeypatch.chdir(place)
        monkeypatch.setenv("NOTES", str(place / "notes"))
        config = dict(BASE)
        for section, key, kind in KEYS:
            if judge.takes(section, key, kind, value):
                taken[f"{section}.{key}"] += 1
                if section:
                    config[section] = config.get(section, {}) | {key: given(kind, value)}
                elif key != "image":
                    # The test writes there, and only below its own directory.
                    config[key] = value.lstrip("/").replace("..", "x")
        check(config, place)
    assert taken["stage2.name"] == len(HOSTILE) - 1, "all but -- alone, which argparse drops"
    assert taken[".results"] > 150 and max(taken["cluster.gres"], taken[".image"]) < 20


def check(config: dict[str, Any], place: Path) -> None:
    """Run all commands of a configuration in `place` and look at what they were given."""
    (place / "own.yaml").write_text(yaml.safe_dump(config))
    read = load.load(["own.yaml"])
    assert read == settled(config), "YAML changed a value"
    rules = pipeline_rules.chain(read, "sha256:0")
    out = rules["report"].out
    out.mkdir(parents=True)
    (out / "report.html").write_text("page")
    page = out.parent / "report.html"
    for command in commands(rules, read, page):
        subprocess.run(["bash", "-c", f"set -euo pipefail; {command}"], check=True)
    assert page.read_text() == "page"
    calls = (place / "notes").read_bytes().decode().split("\0\0end\0")[:-1]
    found = sorted(call.split("\0") for call in calls)
    assert found == sorted(["-m", r.module, *r.flags, *r.quiet] for r in rules.values())
    shutil.rmtree(out.parent)
    assert not list(place.rglob("canary*"))
