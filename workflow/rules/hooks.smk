# What is checked and shown around the jobs of a run.
import atexit
import sys

from snakemake.exceptions import MissingInputException

from llava_steps.commands import plan
from llava_steps.core import filesystem
from llava_steps.pipeline import slurm

for step in this_run.rules.values():
    workflow.get_rule(step.name).docstring = step.declared.summary


def check_plan():
    """Once the graph of jobs is built, and before any of them has spent its time."""
    for line in this_run.jobs():
        print(line, file=sys.stderr)
    for config, stage in this_run.stages_to_train():
        plan.refuse(config, stage)


this_run.take_over(in_one_line, check_plan, MissingInputException)


@in_one_line
def before_jobs():
    this_run.refuse_host_for_image()
    this_run.refuse_nodes_without_slurm()
    lease = this_run.hold()
    atexit.register(lease.__exit__, None, None, None)
    atexit.register(filesystem.remove, this_run.claim_values())
    slurm.wait_for_jobs(this_run.directories())
    this_run.request_forced()
    print("What runs, and why:", *this_run.reasons(), sep="\n", file=sys.stderr)


@atexit.register
def show_plan():
    """After a dry run, show what the run would take. This never fails the dry run itself."""
    planned = (
        workflow.scheduler is not None
    )  # not where Snakemake ended with an error before
    if not (planned and workflow.dryrun and workflow.is_main_process):
        return
    if workflow.output_settings.quiet:
        return
    try:
        for line in plan.lines(
            this_run.config, plan.parser().parse_args([]), this_run.outlook
        ):
            print(line, file=sys.stderr)
    except StepError as error:
        print(f"plan: {error}", file=sys.stderr)


onstart:
    if workflow.is_main_process:
        before_jobs()


onsuccess:
    if workflow.is_main_process:
        in_one_line(this_run.check_results)()
