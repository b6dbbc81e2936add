# The two training stages. A killed stage resumes from its last checkpoint in the store.


rule stage1_checkpoint:
    """Stage 1: train the projector."""
    input:
        needs("stage1_checkpoint"),
    output:
        steps["stage1_checkpoint"].manifest,
    threads: cfg.stage1.gpus
    params:
        **call("stage1_checkpoint"),
    shell:
        "python -m llava_steps.train {params.flags:q} {quiet[stage1_checkpoint]:q}"


rule stage2_checkpoint:
    """Stage 2: train the projector and the language model."""
    input:
        needs("stage2_checkpoint"),
    output:
        steps["stage2_checkpoint"].manifest,
    threads: cfg.stage2.gpus
    params:
        **call("stage2_checkpoint"),
    shell:
        "python -m llava_steps.train {params.flags:q} {quiet[stage2_checkpoint]:q}"
