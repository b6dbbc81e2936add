"""The rules of a run: which step each calls, with which settings, on whose results.

What feeds what is declared in settings/steps.py. Source fields that the configuration leaves empty
are filled with the results of earlier rules; a path given there instead is used as it is, so that
a stage can train on another dataset or start from another checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_steps.pipeline import expand, slurm, variants
from llava_steps.pipeline.expand import Declared, Result
from llava_steps.settings import cli, paths, sweep
from llava_steps.settings.blend import read_blend
from llava_steps.settings.comparison import Comparison
from llava_steps.settings.config import Config
from llava_steps.settings.fields import StepConfig, facts
from llava_steps.settings.hub_id import is_hub_id
from llava_steps.settings.report import Report
from llava_steps.settings.stage.stage import Stage
from llava_steps.settings.steps import STEPS
from llava_steps.store.store import MANIFEST, read_manifest

PAGES = {"report": "report.html", "comparison": "comparison.html"}
"""Kinds of rules that make a page, which is copied beside the results of the run."""


@dataclass(frozen=True)
class Rule:
    """One call of a step module."""

    name: str
    label: str
    """Its variant, by the settings that differ; empty where all variants share it."""
    declared: Declared
    config: Config
    """Configuration of the run, or of a variant of its sweep that has the rule."""
    settings: StepConfig
    """With every source field filled in."""
    out: Path
    """Directory that shows the result, `<results>/<run>/<rule>`."""
    upstream: tuple[str, ...]
    """Rules whose results it reads."""
    after: str
    """Rule that must succeed first, although its result is not read."""
    files: tuple[str, ...]
    """Paths outside the run that it reads, as far as they are known without a network."""
    where: tuple[str, ...]
    """Flags that say where values are kept and which image computes them."""

    @property
    def kind(self) -> str:
        return self.declared.step.kind

    @property
    def names(self) -> tuple[str, ...]:
        """Its names in the configuration: of the rule in all variants, and of its kind."""
        return (self.declared.name, self.kind)

    @property
    def module(self) -> str:
        return f"llava_steps.{self.declared.step.module}"

    @property
    def manifest(self) -> str:
        return str(self.out / MANIFEST)

    @property
    def before(self) -> tuple[str, ...]:
        """Rules whose results it reads, and the one that must have passed before."""
        return (*self.upstream, self.after) if self.after else self.upstream

    @property
    def page(self) -> Path | None:
        """What its job copies beside the results of the run."""
        return self.out.with_name(PAGES[self.kind]) if self.kind in PAGES else None

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
        threads = self.declared.step.threads
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
    """All rules of a run by name, in an order in which they can run; `image` is its digest.

    A rule that is equal in several variants of a sweep is one. The others have their results in
    `<results>/<run>/<what differs>/<rule>`.
    """
    assignments = [variant.assignments for variant in config.variants]
    declared = [expand.declared(variant.config) for variant in config.variants]
    instances = variants.instances(assignments, declared)
    rules: dict[str, Rule] = {}
    by_variant: list[dict[str, Rule]] = []
    for variant, listed, named in zip(config.variants, declared, instances, strict=True):
        own: dict[str, Rule] = {}
        for each in listed:
            instance = named[each.name]
            if instance.name not in rules:
                rules[instance.name] = _rule(each, instance, variant.config, image, own)
            own[each.name] = rules[instance.name]
        by_variant.append(own)
    if config.sweep:
        compared = _comparison(
            config, dict(zip(sweep.labels(assignments), by_variant, strict=True))
        )
        instance = variants.Instance(compared.name, "")
        rules[compared.name] = _rule(compared, instance, config, image, rules)
    return rules


def _comparison(config: Config, by_variant: Mapping[str, Mapping[str, Rule]]) -> Declared:
    """The rule that compares the variants of a sweep, given as label -> rules."""
    feeds: dict[str, Result] = {}
    differ: dict[str, str] = {}
    last: dict[str, str] = {}
    for variant, (label, own) in zip(config.variants, by_variant.items(), strict=True):
        differ[label] = json.dumps(variant.assignments)
        feeds[f"evaluations.{label}"] = Result(own["evaluation"].name)
        trained = [rule for rule in own.values() if rule.kind == "checkpoint"]
        for rule in trained:
            feeds[f"trainings.{label}/{rule.declared.stage}"] = Result(rule.name)
        # Not what the step would take anyway: the command lines of large sweeps are long.
        if trained[-1].declared.stage != variant.config.last_stage:
            last[label] = variant.config.last_stage
    settings = Comparison(title=config.run, settings=differ, last_stages=last)
    return Declared("comparison", STEPS["comparison"], settings, feeds, is_result=True)


def results(rules: Mapping[str, Rule]) -> list[str]:
    """Those of `rules` that a run is for."""
    return [name for name, rule in rules.items() if rule.declared.is_result]


def groups(rules: Mapping[str, Rule]) -> dict[str, list[str]]:
    """Names that stand for several rules: a kind of every dataset, a rule of every variant."""
    made: dict[str, list[str]] = {}
    for name, rule in rules.items():
        made.setdefault(rule.declared.name, []).append(name)
        if rule.declared.step.each == "dataset":
            made.setdefault(rule.kind, []).append(name)
    return {name: [*dict.fromkeys(rs)] for name, rs in made.items() if name not in rules}


def lost(rules: Mapping[str, Rule]) -> list[str]:
    """A message for each missing file of the user, where a result was made from another file.

    Snakemake would keep such a result silently, because it cannot make it again.
    """
    messages = []
    for rule in rules.values():
        shown = read_manifest(rule.out)
        for item in paths.given(rule.settings):
            text = item.text if facts(item.info).is_data else ""
            if shown and text in rule.files and not os.path.exists(text):
                before = shown["inputs"].get(item.key, {}).get("path", "")
                if before != text:
                    key = rule.declared.key(item)
                    made = f"{rule.out} was made from {before}" if before else "was empty before"
                    messages.append(f"{key}: {text} does not exist; {made}")
    return messages


def shares(config: Config, rules: Mapping[str, Rule]) -> dict[str, dict[str, Rule]]:
    """The calls that share the work of a rule, by rule and share; a rule of one job has none.

    Each has the name of the rule whose work it shares: it is forced with it.
    """
    made = {}
    for name, whole in rules.items():
        count = _jobs(config, whole.declared)
        if count > 1:
            labels = {f"{number}-of-{count}": number for number in range(1, count + 1)}
            made[name] = {
                label: _share(whole, label, f"{number}/{count}") for label, number in labels.items()
            }
    return made


def _jobs(config: Config, declared: Declared) -> int:
    """The number of jobs that share the work of a rule."""
    if declared.step.kind != "tar_shards":
        return 1
    jobs = config.cluster.jobs
    return jobs.get(declared.name, jobs.get("tar_shards", 1))


def _share(whole: Rule, label: str, part: str) -> Rule:
    settings = whole.settings.model_copy(update={"part": part, "parts": "", "remove_parts": False})
    out = share_out(whole, label)
    return replace(whole, settings=settings, out=out, where=(f"--save-dir={out}", *whole.where[1:]))


def share_out(whole: Rule, name: str) -> Path:
    """Directory that shows a share of a rule's work until the whole is sealed."""
    return _parts(whole.out) / name


def _parts(out: Path) -> Path:
    return out.with_name(f"{out.name}_parts")


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
    declared: Declared,
    instance: variants.Instance,
    config: Config,
    image: str,
    own: Mapping[str, Rule],
) -> Rule:
    """A rule of the run; `own` are those before it, by the names that `declared` feeds it from."""
    out = Path(config.results, config.run, instance.label, declared.name)
    upstream = [own[result.rule].name for result in declared.feeds.values()]
    files: list[str] = []
    for item in paths.given(declared.settings):
        if not item.text or item.key in declared.feeds:
            continue
        members = []
        if facts(item.info).is_blend and os.path.isfile(item.text):
            members = [str(path) for path in read_blend(Path(item.text), "train").files]
        own_data = facts(item.info).is_data and not is_hub_id(item.text, facts(item.info).hub)
        named = ((item.text, own_data), *((m, True) for m in members))
        for path, is_data in named:
            of_run = [rule.name for rule in own.values() if rule.holds(path) is not None]
            upstream += of_run
            files += [] if of_run else _on_disk(path, is_data)
    fed = {key: str(own[result.rule].out / result.inside) for key, result in declared.feeds.items()}
    settings = paths.replaced(declared.settings, fed)
    where = [f"--save-dir={out}", f"--store={config.store}"]
    return Rule(
        name=instance.name,
        label=instance.label,
        declared=declared,
        config=config,
        settings=settings.model_copy(update=_filled(declared, instance, config, out)),
        out=out,
        upstream=tuple(dict.fromkeys(upstream)),
        after=own[declared.after].name if declared.after else "",
        files=tuple(dict.fromkeys(files)),
        where=(*where, f"--image={image}") if image else tuple(where),
    )


def _filled(
    declared: Declared, instance: variants.Instance, config: Config, out: Path
) -> dict[str, Any]:
    """Settings besides sources that a rule gets from the run."""
    settings = declared.settings
    if isinstance(settings, Stage) and not settings.name:
        return {"name": "-".join(filter(None, (config.run, declared.stage, instance.label)))}
    if isinstance(settings, Report) and not settings.title:
        return {"title": " ".join(filter(None, (config.run, instance.label)))}
    if _jobs(config, declared) > 1:
        return {"parts": str(_parts(out)), "remove_parts": True}
    return {}


def _on_disk(text: str, is_data: bool) -> list[str]:
    """What to watch for a path that the configuration names; nothing for a hub id."""
    # os.path: no error for what cannot be a path, such as a name that is too long.
    manifest = os.path.join(text, MANIFEST)
    if os.path.isfile(manifest):
        return [str(Path(manifest))]
    return [text] if is_data or os.path.exists(text) else []
