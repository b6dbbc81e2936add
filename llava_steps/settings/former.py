"""The training options of the scripts that this project replaces, and their settings here.

docs/reference/options.md is made from this table and from the settings classes.
tests/unit/test_options.py asserts the effect of each.
"""

from __future__ import annotations

from llava_steps.settings.fields import flag_name
from llava_steps.settings.stage.stage import Stage

OPTIONS: dict[str, str] = {
    "gpus": "on the command line -1 is all GPUs of the machine",
    "gpu-ids": "",
    "save": "",
    "name": "",
    "wandb": "",
    "log-interval": "lines in a log; a terminal shows one progress line",
    "megatron-load-dir": "",
    "tokenizer-load-dir": "",
    "save-dir": "directory of the result; in a run `<results>/<run>/<rule>`",
    "sif-path": "container image that the step runs in, by apptainer or singularity; "
    "APPTAINER_BIND names further directories to mount",
    "save-optim": "an interrupted training resumes with its optimizer in any case",
    "load-optim": "",
    "init": "",
    "save-interval": "",
    "skip-train-iteration-range": "",
    "tp": "",
    "pp": "",
    "micro-batch-size": "",
    "global-batch-size": "",
    "num-workers": "",
    "node": "",
    "rank": "",
    "master-addr": "",
    "master-port": "",
    "backend": "",
    "interface": "",
    "rdzv-port": "",
    "dist-optim": "",
    "image-token-id": "",
    "pad-token-id": "",
    "freeze-lm": "",
    "stage": "the section of the configuration",
    "lang": "",
    "slurm-job-id": "",
    "slurm-output-name": "",
    "fp8": "",
    "no-add-class-token": "",
    "debug": "",
    "deterministic": "",
    "data-path": "",
}
"""Option -> a note besides the description of its setting."""

ELSEWHERE = {"save-dir": ("results", "run"), "sif-path": ("image",)}
"""Options outside the stages: top-level keys of the configuration."""


def field_of(option: str) -> str | None:
    """The setting of a stage that the option belongs to; None for those in `ELSEWHERE`."""
    if option in ELSEWHERE:
        return None
    for name, info in Stage.model_fields.items():
        if f"--{option}" in (flag_name(name, info), "--" + name.replace("_", "-")):
            return name
    raise KeyError(f"a stage has no setting for --{option}")
