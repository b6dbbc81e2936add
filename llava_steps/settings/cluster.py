"""What the jobs of a run ask Slurm for."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator

from llava_steps.settings.steps import STEPS

PerRule = dict[str, PositiveInt]


class Cluster(BaseModel):
    """What jobs ask Slurm for, as RULE: NUMBER. Rules that are not named get what the profile says;
    nodes and GPUs are those of the stages. Nothing here recomputes anything."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    gres: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.:-]*$",
        description="Slurm's name of a node's GPUs without their number, as gpu or gpu:h100; "
        "empty: jobs ask for none",
    )
    runtime: PerRule = Field(
        {"stage1_checkpoint": 1440, "stage2_checkpoint": 1440},
        description="minutes; a training that needs more is submitted again and goes on",
    )
    mem_mb: PerRule = Field(
        {"stage1_checkpoint": 200_000, "stage2_checkpoint": 200_000},
        description="memory of a node, MB",
    )
    cpus: PerRule = Field({}, description="CPUs of a task; unless given what its processes need")
    jobs: PerRule = Field(
        {},
        description="jobs that share the work of tar_shards; without Slurm they run side by side",
    )

    @field_validator("jobs")
    @classmethod
    def _shared(cls, asked: PerRule) -> PerRule:
        if others := sorted({*asked} - {"tar_shards"}):
            raise ValueError(f"{others[0]} is one job: only the work of tar_shards can be shared")
        return asked

    @field_validator("runtime", "mem_mb", "cpus")
    @classmethod
    def _rules(cls, asked: PerRule, info: ValidationInfo) -> PerRule:
        for name in asked:
            if name not in STEPS:
                raise ValueError(f"{name} is not a rule; rules are {', '.join(STEPS)}")
        return {**cls.model_fields[str(info.field_name)].default, **asked}
