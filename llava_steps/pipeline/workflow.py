"""A run under Snakemake: what the rules of the Snakefile use, and the checks around the jobs.

Fingerprints decide what runs. Before Snakemake builds its graph, `Run.build` computes which rules
are demanded and forces them; afterwards it compares the jobs of the graph with the demand. Errors
are those of core/errors.py; the Snakefile turns them into Snakemake's own.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, LockedError, environment_error
from llava_steps.core.log import PROGRESS
from llava_steps.pipeline import job_table, missing, outlook, rules, slurm
from llava_steps.settings import load
from llava_steps.settings.config import Config
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import registry
from llava_steps.store.container import exec_words, image_digest
from llava_steps.store.lease import STALE_AFTER, Lease
from llava_steps.store.run import FORCE_REQUEST
from llava_steps.store.store import MANIFEST

SHARE = "{}_part"
"""The rule of one share of a rule."""

PASSED = re.compile(
    r"(NCCL|GLOO|TORCH_NCCL|TORCH_GLOO|UCX|FI|OMP|WANDB|HF)_\w+|CUDA_VISIBLE_DEVICES|SLURM_JOB_ID"
    r"|(https?|no|all)_proxy|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|" + PROGRESS,
    flags=re.IGNORECASE,
)
"""Variables that a container gets; with --cleanenv in the profile it gets no others."""


def set_environment() -> None:
    """Prepare the environment that steps inherit."""
    # Steps run in the Python that runs Snakemake, activated or not; an image has its own PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Several steps write to one terminal: their lines stay apart, live bars would not.
    os.environ.setdefault(PROGRESS, "lines")
    for name in [*os.environ]:
        if PASSED.fullmatch(name):
            os.environ.setdefault(f"APPTAINERENV_{name}", os.environ[name])


def configuration(workflow: Any, arguments: list[str]) -> Config:
    """The checked configuration: the shipped file, --configfile overlays, --config values.

    Raises:
        ConfigError: the configuration is wrong, or is given in a way that Snakemake would not pass
            on to its jobs.
    """
    if workflow.config_settings.replace_workflow_config:
        raise ConfigError(
            "--replace-workflow-config is not supported; put `standalone: true` into your file"
        )
    given = [word.partition("=")[0] for word in arguments].count("--configfile")
    if given > 1 and workflow.is_main_process:
        raise ConfigError(
            "--configfile is given twice, and Snakemake takes the last one only; name all files "
            "after one: --configfile a.yaml b.yaml"
        )
    overlays = [*workflow.overwrite_configfiles]
    shipped = [file for file in workflow.configfiles if file not in overlays]
    return load.load([*shipped, *overlays], workflow.config_settings.config_args)


class Run:
    """The rules of a configuration, and the state of their results."""

    def __init__(self, workflow: Any, ancient: Callable[[str], Any]) -> None:
        """`workflow` is Snakemake's, `ancient` its mark for input whose age does not count.

        Raises:
            ConfigError: the configuration is wrong, or a file that it names is missing.
        """
        self.workflow = workflow
        self._ancient = ancient
        self.config = configuration(workflow, sys.argv)
        self.image = image_digest(self.config.image, Path(self.config.store))
        self.rules = rules.chain(self.config, self.image)
        if lost := rules.lost(self.rules) if workflow.is_main_process else []:
            raise ConfigError("\n".join(lost))
        self.shares = rules.shares(self.config, self.rules)
        """Calls that share the work of a rule, by rule and share."""
        self.groups = rules.groups(self.rules)
        """Names that stand for several rules."""
        self.outlook: dict[str, outlook.State] = {}
        """State of each rule, once the graph of jobs is built."""
        self.demand: dict[str, str] = {}
        """Rules that must run, each with the reason."""
        self.forced: set[str] = set()
        """Rules that the user forces."""
        self._commands = {name: self._command(rule) for name, rule in self.rules.items()}
        self._read = {name: self._paths(rule) for name, rule in self.rules.items()}

    def _all(self) -> list[rules.Rule]:
        """The rules and the shares of their work."""
        return [*self.rules.values(), *(s for of in self.shares.values() for s in of.values())]

    def _paths(self, rule: rules.Rule) -> list[str]:
        paths = [*(self.rules[other].manifest for other in rule.before), *rule.files]
        for path in paths:
            if "{" in path or "}" in path:
                raise ConfigError(
                    f"{path}: braces in a path are wildcards to Snakemake; rename it or link to it"
                )
        return paths

    def inputs(self, name: str) -> Callable[[Any], list[Any]]:
        """Input of a rule: manifests of the rules before it, and files of the user.

        The age of files does not count: the input of a rule that is not demanded is ancient. A rule
        that is demanded waits for every demanded rule before it, also across rules that are not:
        Snakemake passes over a job after one that runs unless such inputs connect the two.
        """
        read = self._read[name]

        def paths(wildcards: Any) -> list[Any]:
            if name not in self.demand:
                return [self._ancient(path) for path in read]
            waits = outlook.nearest(self.rules, name, self.demand)
            return [*dict.fromkeys([*read, *(self.rules[other].manifest for other in waits)])]

        return paths

    def share_manifests(self, name: str) -> list[str]:
        """Manifests of the shares that a rule joins."""
        return [share.manifest for share in self.shares.get(name, {}).values()]

    def share_manifest(self, name: str, share: str) -> str:
        """Manifest of a share of a rule's work by the name of the share."""
        return str(rules.share_out(self.rules[name], share) / MANIFEST)

    def group_manifests(self, name: str) -> list[str]:
        """Manifests of the rules that a name stands for."""
        return [self.rules[rule].manifest for rule in self.groups[name]]

    def directories(self) -> dict[Path, str]:
        """Directories that show results, those of shares included, with the rule."""
        return {rule.out: rule.name for rule in self._all()}

    def command(self, name: str) -> Callable[[Any], list[str]]:
        """Words of the command of a rule; a function, because words may hold braces."""
        return lambda wildcards: self._commands[name]

    def share_command(self, name: str) -> Callable[[Any], list[str]]:
        """Words of the command of the share that `wildcards.share` names."""
        return lambda wildcards: self._command(self.shares[name][wildcards.share])

    def _command(self, rule: rules.Rule) -> list[str]:
        inside: list[str] = []
        if self.config.image and rule.nodes > 1:
            # `container:` would wrap srun itself, so each task enters the image.
            given = shlex.split(self.workflow.deployment_settings.apptainer_args or "")
            inside = exec_words("apptainer", self._image_file(), given)
        return rule.command(self.config.cluster.gres, inside)

    def _image_file(self) -> str:
        """The image as a file, which each node opens for itself."""
        image = self.config.image
        if not Path(image).is_file():
            raise ConfigError(
                f"image: several nodes need {image!r} as a file: "
                f"apptainer pull image.sif {image}, then image: image.sif"
            )
        return str(Path(image).absolute())

    def container(self, name: str) -> str | None:
        """Image that Snakemake runs a rule in; None without one, or when its tasks enter it."""
        return None if self.rules[name].nodes > 1 else self.config.image or None

    def resources(self, name: str) -> dict[str, Any]:
        """Resources of a rule's job, as far as the configuration decides them."""
        rule = self.rules[name]
        return slurm.asks(rule.names, rule.settings, self.config.cluster)

    def pages(self) -> list[rules.Rule]:
        """The rules that make a page."""
        return [rule for rule in self.rules.values() if rule.page]

    def targets(self) -> list[str]:
        """Manifests of what a run is for, and of its report."""
        return [self.rules[name].manifest for name in rules.results(self.rules)]

    # Before and after the jobs run.

    def build(self) -> None:
        """Build Snakemake's graph such that it holds exactly the demanded jobs.

        Snakemake by itself can plan less: it ignores the params of a job after one that must run,
        and those of a result that it has no record of. So each demanded rule is forced before the
        graph is built, and the graph is compared with the demand afterwards.

        Raises:
            ConfigError: the jobs of the graph are not those that are demanded.
        """
        dag, execution = self.workflow.dag, self.workflow.execution_settings
        if execution and execution.no_hooks:
            raise ConfigError("--no-hooks leaves out the checks of this workflow; drop it")
        self.workflow.dag_settings.rerun_triggers = frozenset()
        self.forced = self._forced_by_user()
        self.outlook = outlook.outlook(self.config, self.rules, self.image)
        self.demand = outlook.demanded(self.rules, self.outlook, self.forced)
        names = {*self.demand}
        names |= {SHARE.format(name) for name in names & {*self.shares}}
        dag.forcerules.update(self.workflow.get_rule(name) for name in names)
        try:
            self._build()
        except self._missing_input:
            missing.refuse(self.rules, self.demand)
            raise
        planned = {job.rule.name for job in dag.needrun_jobs()} & {*self.rules}
        concerned = self._concerned()
        running = [name for name in self.demand if name in concerned]
        missing.refuse(self.rules, running)
        kept_by = {n: entry for n, entry in self._values().items() if n not in self.forced}
        missing.refuse_not_kept(self.rules, running, kept_by)
        lost = [name for name in running if self.outlook[name].lost and name not in self.forced]
        for name in lost:
            out = self.rules[name].out
            raise ConfigError(
                f"{out} shows a value that {self.config.store} does not hold: is the store "
                f"mounted? To compute it again, remove {out} or give --forcerun {name}"
            )
        # Snakemake itself forces an output whose job it did not see end.
        unfinished = {
            job.rule.name for job in dag.jobs if not dag.forcefiles.isdisjoint(job.output)
        }
        wrong = (planned ^ (concerned & {*self.demand})) - unfinished
        if wrong:
            raise ConfigError(
                "Snakemake plans other jobs than the settings and inputs demand:"
                + "".join(
                    f"\n  {name}: {self.demand.get(name, 'its result is up to date')}"
                    for name in sorted(wrong)
                )
            )

    def take_over(
        self,
        wrap: Callable[[Callable[[], None]], Callable[[], None]],
        check: Callable[[], None],
        missing_input: type[Exception],
    ) -> None:
        """Have Snakemake call `build`, through `wrap`, where it would build its graph.

        `check` is called after it when jobs are to run or a dry run shows them. `missing_input` is
        what Snakemake raises when a file is missing that no rule makes.
        """
        self._missing_input = missing_input

        def build() -> None:
            self.build()
            if self.workflow.executor_plugin is not None:
                check()

        if self.workflow.is_main_process:  # a job of a cluster was demanded when it was submitted
            self._build = self.workflow._build_dag
            self.workflow._build_dag = wrap(build)

    def _concerned(self) -> set[str]:
        """Rules of the graph, and all that their results need."""
        here = {job.rule.name for job in self.workflow.dag.jobs}
        return rules.before(self.rules, here & {*self.rules})

    def _forced_by_user(self) -> set[str]:
        """Rules that --forcerun, --force and --forceall name, by their name or a file."""
        dag = self.workflow.dag
        names = {rule.name for rule in dag.forcerules}
        files = {os.path.normpath(file) for file in dag.forcefiles}
        made = [(rule.name, rule.outputs) for rule in self._all()]
        names |= {name for name, outputs in made if files & {*map(os.path.normpath, outputs)}}
        names |= {name for name in self.shares if SHARE.format(name) in names}
        names |= {rule for name, group in self.groups.items() if name in names for rule in group}
        return names & {*self.rules}

    def request_forced(self) -> None:
        """Ask the steps that the user forces to compute again, although the store has their value.

        Only those: of an output whose job Snakemake did not see end, as when a controller was
        killed, the store knows whether it is whole.
        """
        if self.workflow.touch:
            return  # nothing is computed
        asked = self.forced & self._concerned()
        for rule in self._all():
            request = rule.out / FORCE_REQUEST
            if rule.name in asked:
                request.parent.mkdir(parents=True, exist_ok=True)
                request.touch()
            else:
                request.unlink(missing_ok=True)  # of a run that ended before this step

    def refuse_host_for_image(self) -> None:
        """ConfigError when the configured image, which is in every fingerprint, is not used."""
        methods = {str(m) for m in self.workflow.deployment_settings.deployment_method}
        if self.config.image and "apptainer" not in methods:
            raise ConfigError(
                "the configuration names an image, but containers are off: "
                "add --software-deployment-method apptainer (profiles local and slurm do)"
            )

    def refuse_nodes_without_slurm(self) -> None:
        """ConfigError when a stage has several nodes but no srun, which starts its launchers."""
        several = [name for name, rule in self.rules.items() if rule.nodes > 1]
        if several and not shutil.which("srun"):
            raise ConfigError(
                f"{several[0]}: several nodes need Slurm's srun, which is not found; use --profile "
                "slurm on a cluster, set nodes to 1, or start a launcher on each node yourself"
            )

    def stages_to_train(self) -> list[tuple[Config, str]]:
        """The training stages whose jobs the graph holds, each with its configuration."""
        running = {job.rule.name for job in self.workflow.dag.needrun_jobs()}
        return [
            (rule.config, rule.declared.stage)
            for name, rule in self.rules.items()
            if name in running and isinstance(rule.settings, Stage)
        ]

    def hold(self) -> Lease:
        """The lease on the name of the run: what it shows must not change under its own steps.

        Raises:
            LockedError: another run of this name is alive.
        """
        run = f"run {self.config.run!r}"

        @functools.cache
        def checking(holder: str) -> None:
            limit = f"takes up to {STALE_AFTER:.0f} s"
            print(f"{run}: held by {holder}; a check that it is gone {limit}", file=sys.stderr)

        try:
            directory = Path(self.config.results, self.config.run, ".work")
            directory.mkdir(parents=True, exist_ok=True)
            registry.register(Path(self.config.store), Path(self.config.results))
            return Lease(directory, checking=checking).__enter__()
        except LockedError as error:
            raise LockedError(f"{run}: {error}") from None
        except OSError as error:
            raise environment_error(error) or error from None

    def claim_values(self) -> Path:
        """Link to the values that jobs will find in the store, so that `clean` leaves them there.

        Returns:
            The directory of the links, to be removed at the end of the run.
        """
        claims = Path(self.config.results, self.config.run, ".work/claims")
        filesystem.remove(claims)
        claims.mkdir(parents=True)
        for name, entry in self._values().items():
            if name in self.demand and name in self._concerned():
                (claims / name).symlink_to(os.path.relpath(entry.resolve(), claims.resolve()))
        return claims

    def _values(self) -> dict[str, Path]:
        """Store entries of the finished values, by rule."""
        done = {n: s.manifest for n, s in self.outlook.items() if s.outlook == "done"}
        return {
            n: Path(self.config.store, m["step"], m["fingerprint"]) for n, m in done.items() if m
        }

    def check_results(self) -> None:
        """ConfigError unless the results are what the configuration asks for, by fingerprint."""
        outlooks = outlook.outlook(self.config, self.rules, self.image)
        wrong = outlook.demanded(self.rules, outlooks)
        concerned = self._concerned()
        lines = [f"{name}: {why}" for name, why in wrong.items() if name in concerned]
        if lines:
            raise ConfigError(
                "the jobs have run, but the results are not those of the configuration and its "
                "inputs as they are now; did a file change meanwhile? Run again.\n"
                + "\n".join(lines)
            )

    def reasons(self) -> Iterator[str]:
        """A line for each step whose job runs: why it must."""
        planned = {job.rule.name for job in self.workflow.dag.needrun_jobs()}
        for name, why in self.demand.items():
            if name in planned:
                yield f"  {name}: {why}"

    def jobs(self) -> Iterator[str]:
        """Lines of a table: what each rule asks the cluster for, if the profile is of one."""
        if "runtime" in (self.workflow.resource_settings.default_resources or {}):
            counts = dict.fromkeys(self.rules, 1)
            counts |= {SHARE.format(name): len(shares) for name, shares in self.shares.items()}
            yield from job_table.lines(self.workflow, counts, self.config.image)
