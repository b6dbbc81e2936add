"""Settings of `report`."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from llava_steps.settings.fields import StepConfig, source, value


def _result(of: str) -> Any:
    """A result that the page shows if there is one."""
    return source("", f"result of {of}", optional=True)


class Report(StepConfig):
    """One page about a run, from the results of its other steps."""

    title: str = value("", "title of the page; in a run its name")
    samples: PositiveInt = value(2, "sample answers shown per question kind")
    demo_assets: str = _result("demo_assets")
    tar_shards: str = _result("shard_tars")
    energon_dataset: str = _result("prepare_energon")
    hf_model: str = _result("build_hf")
    megatron_checkpoint: str = _result("hf_to_megatron")
    stage1_audit: str = _result("audit for stage 1")
    stage2_audit: str = _result("audit for stage 2")
    stage1_checkpoint: str = _result("train, stage 1")
    stage1_export: str = _result("megatron_to_hf after stage 1")
    stage2_checkpoint: str = _result("train, stage 2")
    hf_export: str = _result("megatron_to_hf after stage 2")
    evaluation: str = _result("evaluate")
    lmms_eval: str = _result("lmms_eval")
    llm_jp_eval_mm: str = _result("llm_jp_eval_mm")
