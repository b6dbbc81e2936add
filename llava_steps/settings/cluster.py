"""Resources that the jobs of a run request from Slurm."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator

from llava_steps.settings.steps import STEPS

PerRule = dict[str, PositiveInt]


class Cluster(BaseModel):
    """Resources of jobs, as RULE: NUMBER; other rules use the profile. Recomputes nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    gres: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.:-]*$",
        description="Slurm's name of a node's GPUs without their number, such as gpu or gpu:h100; "
        "empty: jobs request none",
    )
    runtime: PerRule = Field(
        {"stage1_checkpoint": 1440, "stage2_checkpoint": 1440},
        description="minutes; a training that needs more is resubmitted and resumes",
    )
    mem_mb: PerRule = Field(
        {"stage1_checkpoint": 200_000, "stage2_checkpoint": 200_000},
        description="memory per node, MB",
    )
    cpus: PerRule = Field({}, description="CPUs per task; default: as many as its processes need")
    jobs: PerRule = Field(
        {},
        description="number of jobs that share the work of tar_shards; without Slurm they run in "
        "parallel",
    )

    @field_validator("jobs")
    @classmethod
    def _shared(cls, asked: PerRule) -> PerRule:
        if others := sorted({*asked} - {"tar_shards"}):
            raise ValueError(f"{others[0]} is one job: only tar_shards can have several")
        return asked

    @field_validator("runtime", "mem_mb", "cpus")
    @classmethod
    def _rules(cls, asked: PerRule, info: ValidationInfo) -> PerRule:
        for name in asked:
            if name not in STEPS:
                raise ValueError(f"{name} is not a rule; rules are {', '.join(STEPS)}")
        return {**cls.model_fields[str(info.field_name)].default, **asked}
