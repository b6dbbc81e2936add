# Megatron checkpoints back to Hugging Face directories.


rule stage1_export:
    """Stage 1 checkpoint to Hugging Face safetensors, to be evaluated."""
    input:
        needs("stage1_export"),
    output:
        steps["stage1_export"].manifest,
    resources:
        **asks("stage1_export"),
    params:
        **call("stage1_export"),
    shell:
        "python -m llava_steps.megatron_to_hf {params.flags:q} {quiet[stage1_export]:q}"


rule hf_export:
    """Stage 2 checkpoint to Hugging Face safetensors."""
    input:
        needs("hf_export"),
    output:
        steps["hf_export"].manifest,
    resources:
        **asks("hf_export"),
    params:
        **call("hf_export"),
    shell:
        "python -m llava_steps.megatron_to_hf {params.flags:q} {quiet[hf_export]:q}"
