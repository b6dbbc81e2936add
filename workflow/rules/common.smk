# The run that the configuration asks for; llava_steps/pipeline/workflow.py has its code.
import sys

from snakemake.exceptions import WorkflowError

from llava_steps.core.errors import StepError
from llava_steps.pipeline.workflow import Run, set_environment


def in_one_line(function):
    """`function`, with errors of this project as Snakemake shows its own: without a traceback."""

    def call(*arguments):
        try:
            return function(*arguments)
        except StepError as error:
            raise WorkflowError(str(error)) from None

    return call


this_run = in_one_line(Run)(workflow, ancient)
this_run.take_over(in_one_line)
set_environment()
