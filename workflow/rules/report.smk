# What the model can do, before training and after each stage, and a page that tells the run.


rule evaluation:
    """Scores on held-out data, and sample answers."""
    input:
        needs("evaluation"),
    output:
        steps["evaluation"].manifest,
    threads: 2
    resources:
        **asks("evaluation"),
    params:
        **call("evaluation"),
    shell:
        "python -m llava_steps.evaluate {params.flags:q} {quiet[evaluation]:q}"


rule report:
    """One page that tells the run."""
    input:
        needs("report"),
    output:
        manifest=steps["report"].manifest,
        page=report(
            str(Path(cfg.results, cfg.run, "report.html")),
            caption="../report/run.rst",
            category="Run",
            labels={"run": cfg.run},
        ),
    resources:
        **asks("report"),
    params:
        **call("report"),
        made=str(steps["report"].out / "report.html"),
    shell:
        "python -m llava_steps.report {params.flags:q} {quiet[report]:q}"
        " && cp -- {params.made:q} {output.page:q}"
