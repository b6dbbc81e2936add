# The page about the run, copied to results/<run>/report.html, and into `snakemake --report`.


rule report:
    """One page about the run."""
    input:
        this_run.inputs("report"),
    output:
        manifest=this_run.rules["report"].manifest,
        page=report(
            str(this_run.rules["report"].page),
            caption="../report/run.rst",
            category="Run",
            labels={"run": this_run.config.run},
        ),
    resources:
        **this_run.resources("report"),
    params:
        command=this_run.command("report"),
        made=str(this_run.rules["report"].out / "report.html"),
    shell:
        "{params.command:q} && cp -- {params.made:q} {output.page:q}"
