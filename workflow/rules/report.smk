# What the model can do, before training and after each stage.


rule evaluation:
    """Exact-match accuracy on held-out data."""
    input:
        needs("evaluation"),
    output:
        steps["evaluation"].manifest,
    threads: 2
    params:
        **call("evaluation"),
    shell:
        "python -m llava_steps.evaluate {params.flags:q} {quiet[evaluation]:q}"
