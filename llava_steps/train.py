"""Train one stage: 1 for the projector, 2 for projector and language model.

    llava-steps train --stage 2 --tp 2 --save-dir results/demo/stage2_checkpoint \\
        --megatron-load-dir results/demo/stage1_checkpoint \\
        --tokenizer-load-dir results/demo/hf_model --data-path results/demo/energon_dataset

An interrupted training resumes from its last checkpoint when it is started again with the same
settings. SIGTERM saves a checkpoint and ends with exit code 75. Progress is in metrics.jsonl of the
store entry, which `work` in --save-dir links to while it runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, DivergedError
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import commit
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step
from llava_steps.store.waiting import Report

if TYPE_CHECKING:
    # Runs in the workers; imported here so that its code is part of this step's code version.
    from llava_steps.training import worker as worker


def run(ctx: Context, cfg: Stage) -> Mapping[str, Any]:
    """Start the workers, wait for them, keep the final checkpoint and summarise the metrics.

    With several nodes the launchers connect first; all but the first only wait for the end.
    """
    from llava_steps.launch import preflight, rendezvous
    from llava_steps.launch.job import Failure, Job
    from llava_steps.launch.launch import launch
    from llava_steps.launch.launcher import this_launcher

    hf_dir = ctx.inputs["tokenizer_load_dir"].path.resolve()
    if "megatron_load_dir" not in ctx.inputs and not cfg.init:
        raise ConfigError("give --megatron-load-dir, or --init to start from random weights")
    preflight.check(cfg, hf_dir)
    job_id = cfg.slurm_job_id or os.environ.get("SLURM_JOB_ID", "")
    for what, text in (("Slurm job", job_id), ("job output", cfg.slurm_output_name)):
        if text:
            ctx.log.info("%s %s", what, text)
    job = Job(
        stage=cfg,
        entry=ctx.entry,
        work=ctx.work,
        checkpoint=None if cfg.init else ctx.inputs["megatron_load_dir"].path.resolve(),
        hf_dir=hf_dir,
        # Not resolved: paths in a blend are relative to the directory of its file, link or not.
        dataset=ctx.inputs["data_path"].path.absolute(),
        fingerprint=ctx.fingerprint,
    )
    launcher = this_launcher(cfg)
    # Launchers of two runs may meet in one entry; those of one run have one --save-dir.
    launcher = replace(launcher, launch=f"{launcher.launch} {ctx.results}")
    if launcher.leads:
        Failure.forget(ctx.work)
    waiting = Report(ctx.log, f"{ctx.entry.parent.name} {ctx.fingerprint}")
    group = rendezvous.meet(cfg, launcher, ctx.work, ctx.again, waiting)
    if group is None:
        return {}
    launch(job, ctx.until_sealed.enter_context(group))
    group.done()
    if not group.launcher.leads:
        return {}
    keep_beside(ctx, cfg)
    lines = [json.loads(line) for line in (ctx.entry / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "skipped" not in line]
    if not rows:
        raise DivergedError(
            "no step updated the weights: all were skipped; metrics.jsonl has the reasons"
        )
    return {
        "steps": len(lines),
        "updates": len(rows),
        "samples": len(lines) * cfg.global_batch_size,
        "tokens": sum(row["tokens"] for row in rows),
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "computed": job.noted(),
    }


def keep_beside(ctx: Context, cfg: Stage) -> None:
    """Keep only the last checkpoint in the payload, which is the value of the training.

    Others, as keep_every selects them, move to `.work/kept`: they are not part of the value.
    """
    for iteration, path in commit.committed(ctx.entry)[:-1]:
        if cfg.keep_every and iteration % cfg.keep_every == 0:
            (ctx.work / "kept").mkdir(exist_ok=True)
            kept = ctx.work / "kept" / path.name
            filesystem.remove(kept)  # of an attempt that was killed before its value was sealed
            path.rename(kept)
    commit.prune(ctx.entry, 1)


def follows(cfg: Stage) -> bool:
    """Whether this launcher is not the one of the first node."""
    from llava_steps.launch.launcher import this_launcher

    return not this_launcher(cfg).leads


STEP = Step(
    name=lambda cfg: f"stage{cfg.stage}_checkpoint",
    config=Stage,
    run=run,
    doc=__doc__,
    resumes=True,
    volatile=("metrics.jsonl", "answers.jsonl", "samples/*"),
    follows=follows,
)

if __name__ == "__main__":
    main(STEP)
