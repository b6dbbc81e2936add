"""The rules of one configuration: the table of steps for its datasets and stages.

The name of a rule is its kind, with the name of its dataset or stage before it. The export of the
last stage is `hf_export`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llava_steps.settings import paths
from llava_steps.settings.blend_file import BlendFile
from llava_steps.settings.config import UNTRAINED, Config
from llava_steps.settings.dataset import Audit
from llava_steps.settings.evaluation import Evaluation
from llava_steps.settings.fields import StepConfig, facts
from llava_steps.settings.forms import FIRST_STAGES
from llava_steps.settings.load import DEMO
from llava_steps.settings.report import Report
from llava_steps.settings.stage.stage import Stage
from llava_steps.settings.steps import DATA, START, STEPS, StepDeclaration

KEPT = ".work/kept/iter_{:07d}"
"""The checkpoint of a step that a training kept, in its result."""


class Result(NamedTuple):
    """What another rule makes, or something inside it."""

    rule: str
    inside: str = ""


@dataclass(frozen=True)
class Declared:
    """A rule of a configuration, before it is known where its results are."""

    name: str
    step: StepDeclaration
    settings: StepConfig
    """As the configuration has them; source fields that `feeds` fills are empty."""
    feeds: Mapping[str, Result] = field(default_factory=dict)
    """Input -> the result that it reads."""
    after: str = ""
    """Rule that must succeed first, although its result is not read."""
    dataset: str = ""
    stage: str = ""
    is_result: bool = False
    """Whether it is a goal of a run."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """Input -> key of the configuration that names its path, where that is another one."""

    def key(self, item: paths.Given) -> str:
        """The key of the configuration that an input comes from."""
        if item.key in self.keys:
            return self.keys[item.key]
        section = self.step.section or self.step.kind
        if self.dataset:
            section = f"datasets.{self.dataset}"
        elif self.stage and (section == "stages" or facts(item.info).of_stage):
            section = _section(self.stage)
        return f"{section}.{item.field}"

    @property
    def summary(self) -> str:
        """Its description in `snakemake --list-rules`."""
        name = self.dataset or self.stage
        return f"{self.step.summary} [{name}]" if name else self.step.summary


def declared(config: Config) -> list[Declared]:
    """The rules of a configuration, in an order in which they can run."""
    made = [*_Expansion(config).rules()]
    return [*made, _report(config, made)]


def _report(config: Config, rules: list[Declared]) -> Declared:
    """The report: it shows the results and every rule before them, and needs no other."""
    by_name = {rule.name: rule for rule in rules}
    shown: set[str] = set()
    todo = [rule.name for rule in rules if rule.is_result]
    while todo:
        name = todo.pop()
        if name not in shown:
            shown.add(name)
            rule = by_name[name]
            todo += [result.rule for result in rule.feeds.values()]
            todo += [rule.after] * bool(rule.after)
    feeds = {
        name if name in Report.model_fields else f"results.{name}": Result(name)
        for name in by_name
        if name in shown
    }
    fed = _unless_given(config.report, feeds)
    return Declared("report", STEPS["report"], config.report, fed, is_result=True)


def _unless_given(settings: StepConfig, feeds: Mapping[str, Result]) -> dict[str, Result]:
    """The results that a rule reads: `feeds` where its settings name nothing else."""
    texts = {item.key: item.text for item in paths.given(settings)}
    fed = {key: result for key, result in feeds.items() if not texts.get(key)}
    for key, text in texts.items():
        if text.startswith(DEMO):
            fed[key] = Result("demo_assets", text.removeprefix(DEMO))
    return fed


def _section(stage: str) -> str:
    """Section of a stage, as its file may have it."""
    return stage if stage in FIRST_STAGES else f"stages.{stage}"


def of_dataset(kind: str, dataset: str) -> str:
    """Name of the rule of a dataset; the dataset of `tar_shards.source` has no name."""
    return f"{dataset}_{kind}" if dataset else kind


class _Expansion:
    """The rules of one configuration."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stages = config.ordered_stages()

    def rules(self) -> Iterator[Declared]:
        config = self._config
        if config.demo_assets is not None:
            yield Declared("demo_assets", STEPS["demo_assets"], config.demo_assets)
        for name in config.dataset_names:
            yield from self._of_dataset(name)
        yield self._made("hf_model", config.hf_model)
        yield self._made("megatron_checkpoint", config.megatron_checkpoint)
        blends = [(stage, self._blend(stage)) for stage in self._stages]
        yield from (blend for _, blend in blends if blend)
        yield from (self._audit(s) for s in self._stages if config.stages[s].audit)
        for stage in self._stages:
            yield from self._of_stage(stage)
        yield self._evaluation()
        for benchmark in ("lmms_eval", "llm_jp_eval_mm"):
            section = getattr(config, benchmark)
            if section.tasks:
                yield self._made(benchmark, section)

    def _made(
        self,
        kind: str,
        settings: StepConfig,
        name: str = "",
        feeds: Mapping[str, Result] | None = None,
        dataset: str = "",
        stage: str = "",
    ) -> Declared:
        step = STEPS[kind]
        fed = _unless_given(settings, self._fed(step, dataset, stage) | dict(feeds or {}))
        after = f"{stage}_{step.after}" if step.after and self._config.stages[stage].audit else ""
        # A stage that no other one starts from and no export needs.
        starts = {self._config.last_stage, *map(self._config.start_of, self._stages)}
        is_leaf = kind == "checkpoint" and stage not in starts
        return Declared(
            name or kind,
            step,
            settings,
            fed,
            after,
            dataset,
            stage,
            step.result or is_leaf,
            self._keys(step, stage),
        )

    def _keys(self, step: StepDeclaration, stage: str) -> dict[str, str]:
        """Inputs that sections other than the rule's name."""
        shares = self._config.data_of(stage) if stage else {}
        if step.kind == "blend":
            templates = {
                f"chat_templates.{name}": f"{_section(stage)}.data.{name}.chat_template"
                for name in shares
            }
            return templates | {f"datasets.{name}": f"datasets.{name}.path" for name in shares}
        return dict.fromkeys(["data_path"] * len(shares), f"datasets.{[*shares, ''][0]}.path")

    def _fed(self, step: StepDeclaration, dataset: str, stage: str) -> dict[str, Result]:
        """What the table of steps feeds to a rule."""
        feeds = {}
        for key, source in step.feeds.items():
            if source == DATA:
                if data := self._data(stage):
                    feeds[key] = data
            elif source == START:
                start = self._config.start_of(stage)
                feeds[key] = Result(f"{start}_checkpoint" if start else UNTRAINED)
            elif STEPS[source].each == "dataset":
                feeds[key] = Result(of_dataset(source, dataset))
            else:
                feeds[key] = Result(f"{stage}_{source}" if STEPS[source].each else source)
        return feeds

    def _of_dataset(self, name: str) -> Iterator[Declared]:
        config, dataset = self._config, self._config.dataset(name)
        kinds = (
            ("energon_dataset",)
            if getattr(dataset, "tar_dir", "")
            else ("tar_shards", "energon_dataset")
        )
        for kind in kinds if not dataset.path else ():
            settings = getattr(dataset, kind)(getattr(config, kind))
            yield self._made(kind, settings, of_dataset(kind, name), dataset=name)

    def _blend(self, stage: str) -> Declared | None:
        """The rule that writes the blend of a stage; None where it reads one dataset as it is."""
        shares = self._config.data_of(stage)
        if not shares or (len(shares) == 1 and not any(s.options for s in shares.values())):
            return None
        given = {name: self._config.dataset(name).path for name in shares}
        prepared = {name: path for name, path in given.items() if path}
        feeds = {
            f"datasets.{name}": Result(of_dataset("energon_dataset", name))
            for name in shares
            if name not in prepared
        }
        settings = BlendFile.of_shares(shares, prepared)
        return self._made("blend", settings, f"{stage}_blend", feeds, stage=stage)

    def _data(self, stage: str) -> Result | None:
        """The result that a stage reads; None where it reads a path of the user."""
        shares = self._config.data_of(stage)
        if self._blend(stage):
            return Result(f"{stage}_blend", BlendFile.NAME)
        prepared = [n for n in shares if not self._config.dataset(n).path]
        return Result(of_dataset("energon_dataset", prepared[0])) if prepared else None

    def _settings(self, stage: str) -> Stage:
        """The settings of a training."""
        config, section = self._config, self._config.stages[stage]
        filled = {}
        shares = [*config.data_of(stage)]
        if shares and not self._data(stage):
            filled["data_path"] = config.dataset(shares[0]).path
        return section.settings.model_copy(update=filled)

    def _audit(self, stage: str) -> Declared:
        training = self._settings(stage)
        of_stage = [key for key, info in Audit.model_fields.items() if facts(info).of_stage]
        taken = {key: getattr(training, key) for key in of_stage}
        settings = self._config.audit.model_copy(update={"stage": training.stage, **taken})
        return self._made("audit", settings, f"{stage}_audit", stage=stage)

    def _of_stage(self, stage: str) -> Iterator[Declared]:
        config, section = self._config, self._config.stages[stage]
        trained = f"{stage}_checkpoint"
        yield self._made("checkpoint", self._settings(stage), trained, stage=stage)
        if stage == config.last_stage:
            yield self._made("hf_export", config.hf_export, stage=stage)
        elif section.export:
            yield self._made("export", config.hf_export, f"{stage}_export", stage=stage)
        for step in section.kept_steps if section.evaluate_kept else ():
            name = f"{stage}_step{step}"
            kept = {"megatron_dir": Result(trained, KEPT.format(step))}
            yield self._made("export", config.hf_export, f"{name}_export", kept, stage=stage)
            yield self._scores(f"{name}_evaluation", {f"step{step}": f"{name}_export"})

    def _evaluation(self) -> Declared:
        """The rule that scores the model before training and after each exported stage."""
        exports = {
            f"after_{stage}": "hf_export" if stage == self._config.last_stage else f"{stage}_export"
            for stage in self._stages
            if stage == self._config.last_stage or self._config.stages[stage].export
        }
        return self._scores("evaluation", {"before": "hf_model", **exports})

    def _scores(self, name: str, models: Mapping[str, str]) -> Declared:
        """A rule that evaluates models, given as name in the results -> rule."""
        feeds = {
            key if key in Evaluation.model_fields else f"models.{key}": Result(rule)
            for key, rule in models.items()
        }
        return self._made("evaluation", self._config.evaluation, name, feeds)
