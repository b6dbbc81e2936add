# The run that the configuration asks for; llava_steps/pipeline/workflow.py has its code.
import sys

from snakemake.exceptions import CliException

from llava_steps.core.errors import StepError
from llava_steps.pipeline.workflow import Run, set_environment


class OneLine(CliException):
    """An error that Snakemake prints without the lines of the workflow that it came through."""

    __traceback__ = property(lambda self: None, lambda self, trace: None)


def in_one_line(function):
    """`function`, with errors of this project as Snakemake shows its own: without a traceback."""

    def call(*arguments):
        try:
            return function(*arguments)
        except StepError as error:
            raise OneLine(str(error)) from None

    return call


this_run = in_one_line(Run)(workflow, ancient)
set_environment()
