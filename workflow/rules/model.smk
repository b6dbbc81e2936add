# The model before training: one Hugging Face directory, then a Megatron checkpoint.


rule hf_model:
    """Vision tower, language model and a new projector to one Hugging Face LLaVA."""
    input:
        needs("hf_model"),
    output:
        steps["hf_model"].manifest,
    resources:
        **asks("hf_model"),
    params:
        **call("hf_model"),
    shell:
        "python -m llava_steps.build_hf {params.flags:q} {quiet[hf_model]:q}"


rule megatron_checkpoint:
    """Hugging Face safetensors to a Megatron checkpoint."""
    input:
        needs("megatron_checkpoint"),
    output:
        steps["megatron_checkpoint"].manifest,
    resources:
        **asks("megatron_checkpoint"),
    params:
        **call("megatron_checkpoint"),
    shell:
        "python -m llava_steps.hf_to_megatron {params.flags:q} {quiet[megatron_checkpoint]:q}"
