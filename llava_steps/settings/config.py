"""The configuration of a run: one section for each step, from the settings classes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from llava_steps.settings.cluster import Cluster
from llava_steps.settings.conversion import HfExport, HfModel, MegatronCheckpoint
from llava_steps.settings.dataset import Audit, EnergonDataset, TarShards
from llava_steps.settings.demo_assets import DemoAssets
from llava_steps.settings.evaluation import Evaluation, LlmJpEvalMm, LmmsEval
from llava_steps.settings.problem import KeyProblem
from llava_steps.settings.recipe import NAME, Dataset, Share, StageSection
from llava_steps.settings.report import Report
from llava_steps.settings.steps import STEPS

UNTRAINED = "megatron_checkpoint"
"""What `from` names for the model before any training."""


class Variant(NamedTuple):
    """One configuration of a sweep."""

    assignments: dict[str, Any]
    """What it sets, by dotted key."""
    config: Config


class Config(BaseModel):
    """The configuration of a run: config/config.yaml with its overlays."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    run: str = Field(
        "demo",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run: results/<run>",
    )
    results: str = Field(
        "results",
        pattern=r"^[^{}\x00-\x1f]+$",
        description="directory of the runs' results, without braces: Snakemake reads them as "
        "wildcards",
    )
    store: str = Field(
        "store", min_length=1, description="directory of the artefacts, shared by all runs"
    )
    image: str = Field(
        "",
        # Snakemake inserts it into its command lines unquoted.
        pattern=r"^([A-Za-z0-9_./][A-Za-z0-9_./:@+=,~-]*)?$",
        description="container image for the steps: a file, without spaces in its path, or "
        "docker://...@sha256:...; empty: the current environment",
    )
    cluster: Cluster = Field(default_factory=Cluster)
    demo_assets: DemoAssets | None = Field(None, description="makes the demo's data and models")
    datasets: dict[Annotated[str, Field(pattern=NAME)], Dataset] = Field(
        {}, description="named datasets, each with keys of `tar_shards` and `energon_dataset`"
    )
    tar_shards: TarShards = Field(default_factory=TarShards)
    energon_dataset: EnergonDataset = Field(default_factory=EnergonDataset)
    hf_model: HfModel
    megatron_checkpoint: MegatronCheckpoint = Field(default_factory=MegatronCheckpoint)
    audit: Audit = Field(default_factory=Audit)
    stages: dict[Annotated[str, Field(pattern=NAME)], StageSection] = Field(
        min_length=1,
        description="training stages, in order; `all` has keys of every stage, which those of a "
        "stage in the same file override",
    )
    hf_export: HfExport = Field(default_factory=HfExport)
    evaluation: Evaluation
    lmms_eval: LmmsEval = Field(default_factory=LmmsEval)
    llm_jp_eval_mm: LlmJpEvalMm = Field(default_factory=LlmJpEvalMm)
    report: Report = Field(default_factory=Report)
    sweep: dict[str, list[Any]] | list[dict[str, Any]] = Field(
        {},
        description="variants of the run: KEY: [VALUE, ...] for every combination, or a list of "
        "{KEY: VALUE}; keys are dotted, such as stages.stage2.lr",
    )
    _variants: list[Variant] = PrivateAttr(default_factory=list)

    @field_validator("run", "results", "store")
    @classmethod
    def _can_be_made(cls, path: str) -> str:
        if re.match(r"~[\w.-]*(/|$)|\$(\w+|{\w+})(/|$)", path):
            whole = os.path.expandvars(os.path.expanduser(path))
            raise ValueError(f"~ and $ are not expanded in a path; write {whole}")
        if any(len(name.encode()) > 255 for name in path.split("/")):
            raise ValueError("file systems accept names of at most 255 bytes; shorten it")
        return path

    @model_validator(mode="after")
    def _shared_in_one_way(self) -> Config:
        if self.cluster.jobs and (self.tar_shards.part or self.tar_shards.parts):
            raise ValueError(
                "cluster.jobs sets tar_shards.part and tar_shards.parts for each job: leave them "
                "out"
            )
        return self

    @model_validator(mode="after")
    def _stages_start_somewhere(self) -> Config:
        for name, stage in self.stages.items():
            if stage.start and stage.megatron_load_dir:
                raise KeyProblem(
                    ("stages", name, "from"),
                    "names a stage, megatron_load_dir names a path: give only one",
                )
            if stage.start not in {"", UNTRAINED, *self.stages}:
                raise KeyProblem(
                    ("stages", name, "from"),
                    f"{stage.start!r} is not a stage; stages are {', '.join(self.stages)}; "
                    f"{UNTRAINED} is the model before training",
                )
            if stage.start == name:
                raise KeyProblem(
                    ("stages", name, "from"),
                    f"the stage starts from itself; {UNTRAINED} is the model before training",
                )
        self.ordered_stages()
        return self

    @model_validator(mode="after")
    def _data_is_known(self) -> Config:
        for name, stage in self.stages.items():
            here = ("stages", name, "data")
            for dataset in stage.data:
                if dataset not in self.datasets:
                    known = ", ".join(self.datasets) or "none; add the section datasets"
                    raise KeyProblem(here, f"{dataset!r} is not a dataset; datasets are {known}")
            if stage.data or stage.data_path:
                continue
            if len(self.datasets) > 1:
                raise KeyProblem(
                    here, f"is missing; name one or several of {', '.join(self.datasets)}"
                )
            if not self.dataset_names:
                raise KeyProblem(
                    here,
                    "the run has no data; describe it in the section datasets, or give "
                    "tar_shards.source",
                )
        return self

    @model_validator(mode="after")
    def _data_is_described_once(self) -> Config:
        if self.datasets and self.tar_shards.source:
            raise KeyProblem(
                ("tar_shards", "source"),
                "the section datasets describes the data too; make it a dataset there, or leave "
                "it out",
            )
        if self.datasets and self.energon_dataset.tar_dir:
            raise KeyProblem(
                ("energon_dataset", "tar_dir"), "is the data of one dataset; set it there"
            )
        return self

    @model_validator(mode="after")
    def _rule_names_are_distinct(self) -> Config:
        taken = {kind for kind, step in STEPS.items() if not step.each}
        of_stage = [kind for kind, step in STEPS.items() if step.each == "stage"]
        for name, stage in self.stages.items():
            mine = {f"{name}_{kind}" for kind in of_stage}
            if both := sorted({name, *mine} & taken):
                raise KeyProblem(
                    ("stages", name), f"{both[0]} is another rule; give the stage another name"
                )
            steps = stage.kept_steps if stage.evaluate_kept else []
            if both := sorted({f"{name}_step{step}" for step in steps} & self.stages.keys()):
                raise KeyProblem(
                    ("stages", both[0]),
                    f"rules of the kept checkpoints of {name} have this name; choose another",
                )
        return self

    @model_validator(mode="after")
    def _resources_are_for_rules(self) -> Config:
        known = self.rule_names()
        for key in ("runtime", "mem_mb", "cpus", "jobs"):
            for name in getattr(self.cluster, key):
                if name not in known:
                    raise KeyProblem(
                        ("cluster", key, name),
                        f"{name} is not a rule; rules are {', '.join(known)}",
                    )
        return self

    @field_validator("sweep", mode="before")
    @classmethod
    def _is_a_sweep(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for key, choices in given.items():
                if not isinstance(choices, list) or not choices:
                    raise KeyProblem(
                        (key,),
                        f"expected a list of values, got {choices!r}; a key in a section has dots, "
                        "such as stages.stage2.lr",
                    )
            return given
        if isinstance(given, list) and all(isinstance(item, dict) and item for item in given):
            return given
        raise ValueError("expected KEY: [VALUE, ...], or a list of {KEY: VALUE}")

    @field_validator("audit")
    @classmethod
    def _audits_are_of_stages(cls, audit: Audit) -> Audit:
        taken = {"stage", "tokenizer_load_dir", "data_path", "seq_length", "too_long"}
        if given := sorted(taken & audit.model_fields_set):
            raise ValueError(f"{given[0]} is the stage's; set it in each stage instead")
        return audit

    def rule_names(self) -> list[str]:
        """Names of rules and of their kinds, which stand for all rules of a kind."""
        each = {"dataset": [name for name in self.dataset_names if name], "stage": [*self.stages]}
        names: dict[str, None] = {}
        for kind, step in STEPS.items():
            names |= dict.fromkeys(f"{name}_{kind}" for name in each.get(step.each, []))
            if kind in ("export", "evaluation"):
                names |= dict.fromkeys(f"{name}_{kind}" for name in self._kept())
            names[kind] = None
        return [*names]

    def _kept(self) -> list[str]:
        """Names of the checkpoints that are evaluated besides the results of stages."""
        return [
            f"{name}_step{step}"
            for name, stage in self.stages.items()
            for step in (stage.kept_steps if stage.evaluate_kept else ())
        ]

    def sweep_over(self, variants: Iterable[Variant]) -> None:
        """Keep the configurations of the sweep's variants."""
        self._variants.extend(variants)

    @property
    def variants(self) -> list[Variant]:
        """The configurations that the run computes: those of the sweep, or only this one."""
        return self._variants or [Variant({}, self)]

    @property
    def dataset_names(self) -> list[str]:
        """Names of the datasets; the one of the sections has the empty name."""
        is_one = bool(self.tar_shards.source or self.energon_dataset.tar_dir)
        return [*self.datasets] or [""] * is_one

    def dataset(self, name: str) -> Dataset:
        """A dataset by name; the empty one is that of the sections."""
        if name:
            return self.datasets[name]
        key, text = "source", self.tar_shards.source
        if not text:
            key, text = "tar_dir", self.energon_dataset.tar_dir
        return Dataset.model_validate({key: text})

    def data_of(self, stage: str) -> dict[str, Share]:
        """The datasets that a stage reads, by name; none where it reads a path."""
        section = self.stages[stage]
        if section.data or section.data_path:
            return dict(section.data)
        return {self.dataset_names[0]: Share()}

    def start_of(self, stage: str) -> str:
        """The stage that a stage starts from; empty for the model before training."""
        names = [*self.stages]
        start = self.stages[stage].start or names[names.index(stage) - 1]
        return "" if start in (UNTRAINED, stage) or self._is_first(stage) else start

    def _is_first(self, stage: str) -> bool:
        return not self.stages[stage].start and stage == next(iter(self.stages))

    def ordered_stages(self) -> list[str]:
        """The stages in an order in which they can be trained: as in the file where possible.

        Raises:
            ValueError: stages start from each other.
        """
        order: list[str] = []
        while len(order) < len(self.stages):
            free = [
                name
                for name in self.stages
                if name not in order and self.start_of(name) in {"", *order}
            ]
            if not free:
                left = [name for name in self.stages if name not in order]
                raise KeyProblem(
                    ("stages", left[0], "from"),
                    f"stages {', '.join(left)} start from each other; change a from",
                )
            order.append(free[0])
        return order

    @property
    def last_stage(self) -> str:
        """The last stage of the file, whose export is `hf_export`."""
        return [*self.stages][-1]
