# The configuration, the chain made from it, and what every rule needs.
import atexit
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from llava_steps.core import digest, lease, load, pipeline, run
from llava_steps.core.errors import ConfigError, LockedError


def configuration():
    """The checked configuration: the shipped file, --configfile overlays, --config values."""
    if workflow.config_settings.replace_workflow_config:
        # Snakemake does not hand this option on to the jobs of a cluster.
        raise ConfigError(
            "--replace-workflow-config is not supported; put `standalone: true` into your file"
        )
    overlays = [*workflow.overwrite_configfiles]
    shipped = [file for file in workflow.configfiles if file not in overlays]
    return load.load([*shipped, *overlays], workflow.config_settings.config)


def image_digest(cfg):
    """What identifies the container image: never its path."""
    if not cfg.image:
        return ""
    if "@sha256:" in cfg.image:
        return cfg.image.rpartition("@")[2]
    if not Path(cfg.image).is_file():
        raise ConfigError(
            f"image: {cfg.image!r} is neither a file nor pinned with @sha256:...; "
            "build it or pin it"
        )
    Path(cfg.store).mkdir(parents=True, exist_ok=True)
    digests = digest.Digests(Path(cfg.store))
    found = "sha256:" + digests.file(Path(cfg.image))
    digests.save()
    return found


try:
    cfg = configuration()
    steps = pipeline.chain(cfg, image_digest(cfg))
    flags = {rule.name: rule.flags for rule in steps.values()}
    quiet = {rule.name: rule.quiet for rule in steps.values()}
except ConfigError as error:
    raise WorkflowError(str(error)) from None

# Steps run in the Python that runs Snakemake, activated or not (an image has a PATH of its own).
os.environ["PATH"] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ["PATH"]]
)


def needs(name):
    """Input of a rule: manifests of the rules before it, and files of the user."""
    paths = [steps[rule].manifest for rule in steps[name].upstream] + [
        *steps[name].files
    ]
    for path in paths:
        if "{" in path or "}" in path:
            raise WorkflowError(
                f"{path}: braces in a path are wildcards to Snakemake; rename it or link to it"
            )
    return paths


def passed(name):
    """What must have passed before a rule, but is not read: a newer one reruns nothing."""
    return ancient(steps[pipeline.AFTER[name]].manifest)


def call(name):
    """Params of a rule. A change of any of them reruns it; quiet flags stay outside."""
    return {
        "flags": lambda wildcards: flags[name],
        "version": steps[name].version,
    }


def request_forced():
    """Ask the steps of forced rules to compute again, although the store knows their value."""
    dag = workflow.dag
    forced = {
        job.rule.name
        for job in dag.needrun_jobs()
        if job.rule in dag.forcerules or dag.forcefiles.intersection(job.output)
    }
    for rule in steps.values():
        request = rule.out / run.FORCE_REQUEST
        if rule.name in forced:
            request.parent.mkdir(parents=True, exist_ok=True)
            request.touch()
        else:
            request.unlink(missing_ok=True)  # of a run that ended before it got there


def refuse_host_for_image():
    """An image in the configuration is in every fingerprint, so the steps must run in it."""
    methods = {str(method) for method in workflow.deployment_settings.deployment_method}
    if cfg.image and not methods & {"apptainer"}:
        raise WorkflowError(
            "the configuration names an image, but containers are off: "
            "add --software-deployment-method apptainer (profiles local and slurm do)"
        )


def hold_run():
    """One run of a name at a time: what a run shows must not change under its own steps."""
    place = Path(cfg.results, cfg.run, ".work")
    place.mkdir(parents=True, exist_ok=True)
    held = lease.Lease(place)
    try:
        held.__enter__()
    except LockedError as error:
        raise WorkflowError(f"run {cfg.run!r}: {error}") from None
    atexit.register(held.__exit__, None, None, None)


onstart:
    if workflow.is_main_process:
        refuse_host_for_image()
        hold_run()
        request_forced()
