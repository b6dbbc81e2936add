"""The configuration of a run: one section for each step, from the settings classes."""

from __future__ import annotations

import os
import re

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llava_steps.settings.cluster import Cluster
from llava_steps.settings.conversion import HfExport, HfModel, MegatronCheckpoint
from llava_steps.settings.dataset import Audit, EnergonDataset, TarShards
from llava_steps.settings.demo_assets import DemoAssets
from llava_steps.settings.evaluation import Evaluation, LlmJpEvalMm, LmmsEval
from llava_steps.settings.report import Report
from llava_steps.settings.stage.stage import Stage


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
    tar_shards: TarShards
    energon_dataset: EnergonDataset = Field(default_factory=EnergonDataset)
    hf_model: HfModel
    megatron_checkpoint: MegatronCheckpoint = Field(default_factory=MegatronCheckpoint)
    audit: Audit = Field(default_factory=Audit)
    stage1: Stage
    stage2: Stage
    hf_export: HfExport = Field(default_factory=HfExport)
    evaluation: Evaluation
    lmms_eval: LmmsEval = Field(default_factory=LmmsEval)
    llm_jp_eval_mm: LlmJpEvalMm = Field(default_factory=LlmJpEvalMm)
    report: Report = Field(default_factory=Report)

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

    @field_validator("audit")
    @classmethod
    def _audits_are_of_stages(cls, audit: Audit) -> Audit:
        taken = {"stage", "tokenizer_load_dir", "data_path", "seq_length", "too_long"}
        if given := sorted(taken & audit.model_fields_set):
            raise ValueError(f"{given[0]} is the stage's; set it in stage1 and stage2 instead")
        return audit
