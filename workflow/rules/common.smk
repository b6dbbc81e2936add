# The configuration, the chain made from it, and what every rule needs.
import atexit
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError

from llava_steps.commands import plan
from llava_steps.store import lease, run
from llava_steps.pipeline import slurm
from llava_steps.pipeline import steps as pipeline
from llava_steps.settings import load
from llava_steps.store.container import exec_words, image_digest
from llava_steps.core.errors import ConfigError, LockedError, StepError
from llava_steps.core.log import PROGRESS
from llava_steps.planning import cached


def configuration():
    """The checked configuration: the shipped file, --configfile overlays, --config values."""
    if workflow.config_settings.replace_workflow_config:
        # Snakemake does not hand this option on to the jobs of a cluster.
        raise ConfigError(
            "--replace-workflow-config is not supported; put `standalone: true` into your file"
        )
    told = [word.partition("=")[0] for word in sys.argv].count("--configfile")
    if told > 1 and workflow.is_main_process:
        raise ConfigError(
            "--configfile is there twice, of which Snakemake would take the last alone; name all "
            "files behind one: --configfile a.yaml b.yaml"
        )
    overlays = [*workflow.overwrite_configfiles]
    shipped = [file for file in workflow.configfiles if file not in overlays]
    return load.load([*shipped, *overlays], workflow.config_settings.config)


try:
    cfg = configuration()
    image = image_digest(cfg.image, Path(cfg.store))
    steps = pipeline.chain(cfg, image)
    if missing := pipeline.lost(steps) if workflow.is_main_process else []:
        raise ConfigError("\n".join(missing))
    shares = pipeline.shares(cfg, steps)
    flags = {rule.name: rule.flags for rule in steps.values()}
    quiet = {rule.name: rule.quiet for rule in steps.values()}
    if shares:
        quiet["tar_shards_part"] = next(iter(shares.values())).quiet
except StepError as error:
    raise WorkflowError(str(error)) from None

# Steps run in the Python that runs Snakemake, activated or not (an image has a PATH of its own).
os.environ["PATH"] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ["PATH"]]
)


# Several steps write to one terminal: lines do not run into each other, live bars would.
os.environ.setdefault(PROGRESS, "lines")


def needs(name):
    """Input of a rule: manifests of the rules before it, and files of the user.

    Fingerprints decide what runs, not the age of files: the input of a job that is not demanded is
    ancient. One that is demanded waits for every demanded job before it, also across jobs that are
    not: Snakemake passes over a job behind one that runs unless a path of such inputs leads to it.
    """
    read = [
        *(steps[other].manifest for other in steps[name].before),
        *steps[name].files,
    ]
    for path in read:
        if "{" in path or "}" in path:
            raise WorkflowError(
                f"{path}: braces in a path are wildcards to Snakemake; rename it or link to it"
            )

    def paths(wildcards):
        if name not in demand:
            return [ancient(path) for path in read]
        waits = (steps[other].manifest for other in cached.nearest(steps, name, demand))
        return [*dict.fromkeys([*read, *waits])]

    return paths


def call(name):
    """Params of a rule, kept by Snakemake with the result; quiet flags stay outside."""
    return {
        "flags": lambda wildcards: flags[name],
        "version": steps[name].version,
    }


# Containers get these of the environment and, with --cleanenv in the profile, nothing else.
PASSED = re.compile(
    r"(NCCL|GLOO|TORCH_NCCL|TORCH_GLOO|UCX|FI|OMP|WANDB|HF)_\w+|CUDA_VISIBLE_DEVICES|SLURM_JOB_ID"
    r"|(https?|no|all)_proxy|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|" + PROGRESS,
    flags=re.IGNORECASE,
)
for variable in [*os.environ]:
    if PASSED.fullmatch(variable):
        os.environ.setdefault(f"APPTAINERENV_{variable}", os.environ[variable])


def start(name):
    """Beginning of a training's command: with several nodes a launcher on each of them."""
    stage = steps[name].settings
    inside = []
    if stage.nodes > 1 and cfg.image:
        # `container:` would wrap srun itself, so these rules have none and each task enters it.
        arguments = shlex.split(workflow.deployment_settings.apptainer_args)
        inside = exec_words("apptainer", image_file(), arguments)
    return slurm.launchers(stage, steps[name].module, cfg.cluster.gres, inside)


def image_file():
    """The image as a file, which each node opens for itself."""
    if not Path(cfg.image).is_file():
        raise WorkflowError(
            f"image: several nodes need {cfg.image!r} as a file: "
            f"apptainer pull image.sif {cfg.image}, then image: image.sif"
        )
    return str(Path(cfg.image).absolute())


def container_of(name):
    """The image that Snakemake runs a training in; None where its tasks enter it themselves."""
    return None if steps[name].settings.nodes > 1 else cfg.image or None


def asks(name):
    """Resources of a rule's job, as far as the configuration decides them."""
    return slurm.asks(name, steps[name].settings, cfg.cluster)


def rule_of(job):
    """The step that a job belongs to; a share of sharding counts as the whole."""
    return "tar_shards" if job.rule.name == "tar_shards_part" else job.rule.name


def forced_by_user(dag):
    """Steps of the rules and files that --forcerun, --force and --forceall name."""
    rules = {*(rule.name for rule in dag.forcerules)}
    files = {os.path.normpath(file) for file in dag.forcefiles}
    parts = {"tar_shards_part"} if shares else set()
    return {
        name
        for name, rule in steps.items()
        if name in rules
        or files & {*map(os.path.normpath, (rule.manifest, rule.page or rule.manifest))}
        or (name == "tar_shards" and rules & parts)
    }


def demand_jobs():
    """Have Snakemake run exactly the jobs that the fingerprints demand.

    What Snakemake concludes by itself can be less: it does not look at the params of a job behind
    one that must run, nor at those of a result that it has no record of. So each demanded rule is
    forced before the graph is built, and the graph is compared with the demand afterwards.
    """
    if not workflow.is_main_process:
        return  # a job of a cluster, which was demanded
    build = workflow._build_dag

    def build_and_compare():
        dag, execution = workflow.dag, workflow.execution_settings
        if execution and execution.no_hooks:
            raise WorkflowError("--no-hooks leaves out the checks of this workflow")
        workflow.dag_settings.rerun_triggers = frozenset()
        forced = forced_by_user(dag)
        try:
            outlook.update(plan.outlook(cfg, steps, image))
        except StepError as error:
            raise WorkflowError(str(error)) from None
        demand.update(cached.demanded(steps, outlook, forced))
        names = {*demand} | (
            {"tar_shards_part"} if "tar_shards" in demand and shares else set()
        )
        dag.forcerules.update(workflow.get_rule(name) for name in names)
        build()
        planned = {rule_of(job) for job in dag.needrun_jobs()} & {*steps}
        here = pipeline.before(steps, {rule_of(job) for job in dag.jobs} & {*steps})
        unfinished = {
            rule_of(job)
            for job in dag.jobs
            if not dag.forcefiles.isdisjoint(job.output)
        }
        wrong = planned ^ (here & {*demand})
        if wrong - unfinished:
            raise WorkflowError(
                "Snakemake plans other jobs than the settings and inputs demand:"
                + "".join(
                    f"\n  {name}: {demand.get(name, 'its result is up to date')}"
                    for name in sorted(wrong - unfinished)
                )
            )
        requested.update(forced & here)

    workflow._build_dag = build_and_compare


outlook = {}  # state of each step, once the graph of jobs is built
demand = {}  # steps that must run, with the reasons
requested = set()  # steps that the user forces
demand_jobs()


def request_forced():
    """Ask the steps of forced rules to compute again, although the store knows their value.

    Only what the user forces: Snakemake itself forces an output whose job it did not see end, as
    when a controller was killed, and the store knows best whether that value is whole.
    """
    for rule in (*steps.values(), *shares.values()):
        request = rule.out / run.FORCE_REQUEST
        if rule.name in requested:
            request.parent.mkdir(parents=True, exist_ok=True)
            request.touch()
        else:
            request.unlink(missing_ok=True)  # of a run that ended before it got there


def check_results():
    """A run is done when its results are what the configuration asks for, by fingerprint."""
    found = plan.outlook(cfg, steps, image)
    here = pipeline.before(
        steps, {rule_of(job) for job in workflow.dag.jobs} & {*steps}
    )
    wrong = [
        f"{name}: {why}"
        for name, why in cached.demanded(steps, found).items()
        if name in here
    ]
    if wrong:
        raise WorkflowError(
            "the jobs have run, but the results are not those of the configuration and its inputs "
            "as they are now; did a file change meanwhile? Run again.\n"
            + "\n".join(wrong)
        )


def refuse_host_for_image():
    """An image in the configuration is in every fingerprint, so the steps must run in it."""
    methods = {str(method) for method in workflow.deployment_settings.deployment_method}
    if cfg.image and not methods & {"apptainer"}:
        raise WorkflowError(
            "the configuration names an image, but containers are off: "
            "add --software-deployment-method apptainer (profiles local and slurm do)"
        )


def refuse_nodes_without_slurm():
    """Only srun starts launchers on other nodes."""
    several = [name for name in steps if getattr(steps[name].settings, "nodes", 1) > 1]
    if several and not shutil.which("srun"):
        raise WorkflowError(
            f"{several[0]}: several nodes need Slurm's srun, which is not here; use --profile "
            "slurm on a cluster, set nodes to 1, or start a launcher on each node by hand"
        )


def refuse_layouts():
    """What stage 2 could not be cut into is told before stage 1 has cost its time."""
    running = {job.rule.name for job in workflow.dag.needrun_jobs()}
    try:
        plan.refuse(cfg, [n for n in (1, 2) if f"stage{n}_checkpoint" in running])
    except StepError as error:
        raise WorkflowError(str(error)) from None


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


def wait_for_jobs():
    """A controller that was killed leaves its jobs running: wait for those that write this run."""
    for name, rule in (*steps.items(), *shares.items()):
        held = rule.out / "work/.work/lease.json"
        try:
            job = json.loads(held.read_bytes())["slurm_job_id"]
        except FileNotFoundError:
            continue
        while job and shutil.which("squeue") and is_queued(job):
            print(
                f"waiting for Slurm job {job}, which computes {name}", file=sys.stderr
            )
            time.sleep(10)


def is_queued(job):
    """Whether Slurm still has the job, running or waiting to be run again."""
    asked = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%T"],
        capture_output=True,
        text=True,
    )
    return bool(asked.stdout.strip())


def show_jobs():
    """What each rule asks the cluster for; shown by runs and dry runs whose profile has one."""
    on_cluster = workflow.get_rule("all").resources.get("runtime") is not None
    if not (workflow.is_main_process and on_cluster):
        return
    columns = ("nodes", "gres", "cpus_per_task", "mem_mb", "runtime", "slurm_partition")
    titles = "rule,jobs,nodes,GPUs a node,cpus,MB,min,partition,image"
    rows = [tuple(titles.split(","))]
    jobs = dict.fromkeys(steps, 1)
    if shares:
        jobs["tar_shards_part"] = len(shares)
    for name, count in jobs.items():
        found = workflow.get_rule(name).resources
        asked = {key: plain(found.get(key), name) for key in columns}
        asked["cpus_per_task"] = asked["cpus_per_task"] or plain(
            found.get("_cores"), name
        )
        asked["nodes"] = asked["nodes"] or 1
        cells = [asked[key] or "-" for key in columns]
        rows.append((name, count, *cells, cfg.image or "-"))
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (str(cell).ljust(width) for cell, width in zip(row, widths))
        print("  ".join(cells).rstrip(), file=sys.stderr)


def plain(resource, name):
    """A resource as profile or rule gave it; computed ones are known once there is a job."""
    raw = getattr(resource, "raw", resource)
    return "computed" if callable(raw) else raw


def tell_plan():
    """After a dry run: what the run would take. It is never in the way of the dry run itself."""
    planned = (
        workflow.scheduler is not None
    )  # not where Snakemake ended with a mistake before
    if not (planned and workflow.dryrun and workflow.is_main_process):
        return
    if workflow.output_settings.quiet:
        return
    try:
        for line in plan.lines(cfg, plan.parser().parse_args([]), outlook):
            print(line, file=sys.stderr)
    except StepError as error:
        print(f"plan: {error}", file=sys.stderr)


atexit.register(tell_plan)


onstart:
    if workflow.is_main_process:
        refuse_host_for_image()
        refuse_nodes_without_slurm()
        refuse_layouts()
        hold_run()
        wait_for_jobs()
        request_forced()


onsuccess:
    if workflow.is_main_process:
        check_results()
