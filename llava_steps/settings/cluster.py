"""Resources that the jobs of a run request from Slurm."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

PerRule = dict[str, PositiveInt]


class Cluster(BaseModel):
    """Resources of jobs, as RULE: NUMBER or KIND: NUMBER, such as checkpoint for all trainings.

    Other rules use the profile. Recomputes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    gres: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.:-]*$",
        description="Slurm's name of a node's GPUs without their number, such as gpu or gpu:h100; "
        "empty: jobs request none",
    )
    runtime: PerRule = Field(
        {},
        description="minutes; default: 1440 for a training, which is resubmitted and resumes if "
        "it needs more",
    )
    mem_mb: PerRule = Field({}, description="memory per node, MB; default: 200000 for a training")
    cpus: PerRule = Field({}, description="CPUs per task; default: as many as its processes need")
    jobs: PerRule = Field(
        {},
        description="number of jobs that share the work of tar_shards, or of one dataset's; "
        "without Slurm they run in parallel",
    )

    @field_validator("jobs")
    @classmethod
    def _shared(cls, asked: PerRule) -> PerRule:
        if others := sorted(name for name in asked if not name.endswith("tar_shards")):
            raise ValueError(f"{others[0]} is one job: only tar_shards can have several")
        return asked
