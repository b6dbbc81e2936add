# What training will see is looked at first; a dataset that would go wrong ends the run here.


rule stage1_audit:
    """Stage 1: look at the dataset as training will see it."""
    input:
        needs("stage1_audit"),
    output:
        steps["stage1_audit"].manifest,
    priority: 1
    resources:
        **asks("stage1_audit"),
    params:
        **call("stage1_audit"),
    shell:
        "python -m llava_steps.audit {params.flags:q} {quiet[stage1_audit]:q}"


rule stage2_audit:
    """Stage 2: look at the dataset as training will see it."""
    input:
        needs("stage2_audit"),
    output:
        steps["stage2_audit"].manifest,
    priority: 1
    resources:
        **asks("stage2_audit"),
    params:
        **call("stage2_audit"),
    shell:
        "python -m llava_steps.audit {params.flags:q} {quiet[stage2_audit]:q}"


starts = {name: start(name) for name in ("stage1_checkpoint", "stage2_checkpoint")}

# The two training stages; with several nodes each task of srun is a launcher. A killed stage
# resumes from its last checkpoint in the store.


rule stage1_checkpoint:
    """Stage 1: train the projector."""
    input:
        needs("stage1_checkpoint"),
    output:
        steps["stage1_checkpoint"].manifest,
    container:
        container_of("stage1_checkpoint")
    threads: cfg.stage1.gpus
    resources:
        **asks("stage1_checkpoint"),
    params:
        **call("stage1_checkpoint"),
    shell:
        "{starts[stage1_checkpoint]:q} {params.flags:q} {quiet[stage1_checkpoint]:q}"


rule stage2_checkpoint:
    """Stage 2: train the projector and the language model."""
    input:
        needs("stage2_checkpoint"),
    output:
        steps["stage2_checkpoint"].manifest,
    container:
        container_of("stage2_checkpoint")
    threads: cfg.stage2.gpus
    resources:
        **asks("stage2_checkpoint"),
    params:
        **call("stage2_checkpoint"),
    shell:
        "{starts[stage2_checkpoint]:q} {params.flags:q} {quiet[stage2_checkpoint]:q}"
