"""The rules of a run: which step each calls, with which settings, on whose results.

What feeds what is declared in settings/steps.py. Source fields that the configuration leaves empty
are filled with the results of earlier rules; a path given there instead is used as it is, so that
a stage can train on another dataset or start from another checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_steps.pipeline import slurm
from llava_steps.settings import cli
from llava_steps.settings.blend import read_blend
from llava_steps.settings.config import Config
from llava_steps.settings.dataset import Audit
from llava_steps.settings.fields import StepConfig, facts
from llava_steps.settings.load import DEMO
from llava_steps.settings.report import Report
from llava_steps.settings.stage.stage import Stage
from llava_steps.settings.steps import STEPS, StepDeclaration, section_of
from llava_steps.store.store import MANIFEST, read_manifest


@dataclass(frozen=True)
class Rule:
    """One call of a step module."""

    name: str
    module: str
    settings: StepConfig
    """With every source field filled in."""
    out: Path
    """Directory that shows the result, `<results>/<run>/<rule>`."""
    upstream: tuple[str, ...]
    """Rules whose results it reads."""
    files: tuple[str, ...]
    """Paths outside the run that it reads, as far as they are known without a network."""
    where: tuple[str, ...]
    """Flags that say where values are kept and which image computes them."""

    @property
    def declared(self) -> StepDeclaration:
        return STEPS[self.name]

    @property
    def manifest(self) -> str:
        return str(self.out / MANIFEST)

    @property
    def before(self) -> tuple[str, ...]:
        """Rules whose results it reads, and the one that must have passed before."""
        after = self.declared.after
        return (*self.upstream, after) if after else self.upstream

    @property
    def page(self) -> Path | None:
        """What its job copies beside the results of the run."""
        return self.out.with_name("report.html") if self.name == "report" else None

    def holds(self, text: str) -> Path | None:
        """The path within its result that a text names; None for one that lies elsewhere."""
        path, out = (Path(os.path.abspath(each)) for each in (text, self.out))
        return path.relative_to(out) if path.is_relative_to(out) else None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Files that its job makes, as Snakemake knows them."""
        return (self.manifest, str(self.page)) if self.page else (self.manifest,)

    @property
    def threads(self) -> int:
        """Cores of its job."""
        threads = self.declared.threads
        return threads if isinstance(threads, int) else int(getattr(self.settings, threads))

    @property
    def flags(self) -> list[str]:
        """The command line but for quiet settings; a change of it asks for another value."""
        return [*cli.flags(self.settings, ("value", "source")), *self.where]

    @property
    def quiet(self) -> list[str]:
        """Flags that never recompute anything."""
        return cli.flags(self.settings, ("quiet",))

    @property
    def nodes(self) -> int:
        """Nodes that its job needs."""
        return self.settings.nodes if isinstance(self.settings, Stage) else 1

    def command(self, gres: str = "", container: Sequence[str] = ()) -> list[str]:
        """Words of the command of its job; see `slurm.launchers` for the arguments."""
        start = ["python", "-m", self.module]
        if isinstance(self.settings, Stage):
            start = slurm.launchers(self.settings, self.module, gres, container)
        return [*start, *self.flags, *self.quiet]


def chain(config: Config, image: str = "") -> dict[str, Rule]:
    """All rules of a run by name, in an order in which they can run; `image` is its digest."""
    run = Path(config.results, config.run)
    rules: dict[str, Rule] = {}
    for step in STEPS.values():
        if step.optional and not _asked(config, step.rule):
            continue
        feeds = step.feeds
        if step.rule == "report":
            # It shows the results and every rule before them, and needs no other.
            shown = before(rules, results(rules))
            feeds = {key: rule for key, rule in feeds.items() if rule in shown}
        rules[step.rule] = _rule(step, config, run, image, feeds, rules)
    return rules


def results(rules: Iterable[str]) -> list[str]:
    """Those of `rules` that a run is for."""
    return [name for name in rules if STEPS[name].result]


def lost(rules: Mapping[str, Rule]) -> list[str]:
    """A message for each missing file of the user, where a result was made from another file.

    Snakemake would keep such a result silently, because it cannot make it again.
    """
    messages = []
    for rule in rules.values():
        shown = read_manifest(rule.out)
        for key, info in type(rule.settings).model_fields.items():
            text = getattr(rule.settings, key) if facts(info).is_data else ""
            if shown and text in rule.files and not os.path.exists(text):
                before = shown["inputs"].get(key, {}).get("path", "")
                if before != text:
                    section = section_of(rule.name)
                    made = f"{rule.out} was made from {before}" if before else "was empty before"
                    messages.append(f"{section}.{key}: {text} does not exist; {made}")
    return messages


def shares(config: Config, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The calls that share the work of `tar_shards`, by name; empty when it is one job.

    Each has the name of the rule whose work it shares: it is forced with it.
    """
    count = config.cluster.jobs.get("tar_shards", 1)
    whole = rules["tar_shards"]
    return {
        f"{number}-of-{count}": replace(
            whole,
            settings=whole.settings.model_copy(
                update={"part": f"{number}/{count}", "parts": "", "remove_parts": False}
            ),
            out=share_out(whole, f"{number}-of-{count}"),
            where=(f"--save-dir={share_out(whole, f'{number}-of-{count}')}", *whole.where[1:]),
        )
        for number in range(1, count + 1)
        if count > 1
    }


def share_out(whole: Rule, name: str) -> Path:
    """Directory that shows a share of a rule's work until the whole is sealed."""
    return _parts(whole.out) / name


def _parts(out: Path) -> Path:
    return out.with_name(f"{out.name}_parts")


def _asked(config: Config, name: str) -> bool:
    """Whether a run has one of the rules that it may leave out."""
    if name == "demo_assets":
        return config.demo_assets is not None
    return bool(getattr(config, name).tasks)


def before(rules: Mapping[str, Rule], names: Iterable[str]) -> set[str]:
    """`names` and every rule whose result they need, directly or not."""
    needed: set[str] = set()
    todo = [*names]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += rules[name].before
    return needed


def _rule(
    step: StepDeclaration,
    config: Config,
    run: Path,
    image: str,
    feeds: Mapping[str, str],
    earlier: Mapping[str, Rule],
) -> Rule:
    name, section = step.rule, section_of(step.rule)
    settings: StepConfig = getattr(config, section)
    if isinstance(settings, Audit):
        stage: Stage = config.stage1 if step.stage == 1 else config.stage2
        fields = Audit.model_fields.items()
        taken = {key: getattr(stage, key) for key, info in fields if facts(info).of_stage}
        settings = settings.model_copy(update={"stage": step.stage, **taken})
    filled: dict[str, Any] = {}
    upstream: list[str] = []
    files: list[str] = []
    for key, info in type(settings).model_fields.items():
        if facts(info).role != "source":
            continue
        text: str = getattr(settings, key)
        if text.startswith(DEMO):
            upstream.append("demo_assets")
            filled[key] = str(run / "demo_assets" / text.removeprefix(DEMO))
        elif text:
            members = []
            if facts(info).is_blend and os.path.isfile(text):
                members = [str(path) for path in read_blend(Path(text), "train").files]
            for path, is_data in ((text, facts(info).is_data), *((m, True) for m in members)):
                of_run = [rule.name for rule in earlier.values() if rule.holds(path) is not None]
                upstream += of_run
                files += [] if of_run else _on_disk(path, is_data)
        elif key in feeds:
            upstream.append(feeds[key])
            filled[key] = str(run / feeds[key])
    if isinstance(settings, Stage) and not settings.name:
        filled["name"] = f"{config.run}-{section}"
    if isinstance(settings, Report) and not settings.title:
        filled["title"] = config.run
    out = run / name
    if config.cluster.jobs.get(name, 1) > 1:
        filled |= {"parts": str(_parts(out)), "remove_parts": True}
    where = [f"--save-dir={out}", f"--store={config.store}"]
    return Rule(
        name=name,
        module=f"llava_steps.{step.module}",
        settings=settings.model_copy(update=filled),
        out=out,
        upstream=tuple(dict.fromkeys(upstream)),
        files=tuple(dict.fromkeys(files)),
        where=(*where, f"--image={image}") if image else tuple(where),
    )


def _on_disk(text: str, is_data: bool) -> list[str]:
    """What to watch for a path that the configuration names; nothing for a hub id."""
    # os.path: no error for what cannot be a path, such as a name that is too long.
    manifest = os.path.join(text, MANIFEST)
    if os.path.isfile(manifest):
        return [str(Path(manifest))]
    return [text] if is_data or os.path.exists(text) else []
