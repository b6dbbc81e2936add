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


if "lmms_eval" in steps:

    rule lmms_eval:
        """Scores of lmms-eval's tasks."""
        input:
            needs("lmms_eval"),
        output:
            steps["lmms_eval"].manifest,
        threads: 2
        resources:
            **asks("lmms_eval"),
        params:
            **call("lmms_eval"),
        shell:
            "python -m llava_steps.lmms_eval {params.flags:q} {quiet[lmms_eval]:q}"


if "llm_jp_eval_mm" in steps:

    rule llm_jp_eval_mm:
        """Scores of llm-jp-eval-mm's tasks."""
        input:
            needs("llm_jp_eval_mm"),
        output:
            steps["llm_jp_eval_mm"].manifest,
        threads: 2
        resources:
            **asks("llm_jp_eval_mm"),
        params:
            **call("llm_jp_eval_mm"),
        shell:
            "python -m llava_steps.llm_jp_eval_mm {params.flags:q} {quiet[llm_jp_eval_mm]:q}"


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
