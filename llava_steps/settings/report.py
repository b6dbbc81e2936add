"""Settings of `report`."""

from __future__ import annotations

from pydantic import PositiveInt

from llava_steps.settings.fields import StepConfig, source, value


class Report(StepConfig):
    """One page about a run, from the results of its other steps."""

    title: str = value("", "title of the page; in a run its name")
    samples: PositiveInt = value(2, "sample answers shown per question kind")
    demo_assets: str = source("", "result of demo_assets")
    tar_shards: str = source("", "result of shard_tars")
    energon_dataset: str = source("", "result of prepare_energon")
    hf_model: str = source("", "result of build_hf")
    megatron_checkpoint: str = source("", "result of hf_to_megatron")
    stage1_audit: str = source("", "result of audit for stage 1")
    stage2_audit: str = source("", "result of audit for stage 2")
    stage1_checkpoint: str = source("", "result of train, stage 1")
    stage1_export: str = source("", "result of megatron_to_hf after stage 1")
    stage2_checkpoint: str = source("", "result of train, stage 2")
    hf_export: str = source("", "result of megatron_to_hf after stage 2")
    evaluation: str = source("", "result of evaluate")
    lmms_eval: str = source("", "result of lmms_eval")
    llm_jp_eval_mm: str = source("", "result of llm_jp_eval_mm")
