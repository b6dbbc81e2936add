# Raw images and conversations to a dataset that training can read.

if "demo_assets" in steps:

    rule demo_assets:
        """Demo: digits, questions, tokenizer, tiny vision tower and language model."""
        output:
            steps["demo_assets"].manifest,
        threads: 2
        resources:
            **asks("demo_assets"),
        params:
            **call("demo_assets"),
        shell:
            "python -m llava_steps.demo_assets {params.flags:q} {quiet[demo_assets]:q}"


if shares:

    rule tar_shards_part:
        """A share of the work of tar_shards, as `jobs` of `cluster` asks for it."""
        input:
            needs("tar_shards"),
        output:
            temp(
                str(
                    pipeline.share_out(steps["tar_shards"], "{share}")
                    / "manifest.json"
                )
            ),
        threads: cfg.tar_shards.workers
        resources:
            **asks("tar_shards"),
        params:
            flags=lambda wildcards: shares[wildcards.share].flags,
            version=steps["tar_shards"].version,
        shell:
            "python -m llava_steps.shard_tars {params.flags:q} {quiet[tar_shards_part]:q}"


rule tar_shards:
    """Raw images and conversations to tar shards."""
    input:
        needs("tar_shards"),
        [share.manifest for share in shares.values()],
    output:
        steps["tar_shards"].manifest,
    threads: cfg.tar_shards.workers
    resources:
        **asks("tar_shards"),
    params:
        **call("tar_shards"),
    shell:
        "python -m llava_steps.shard_tars {params.flags:q} {quiet[tar_shards]:q}"


rule energon_dataset:
    """Tar shards to a megatron-energon dataset."""
    input:
        needs("energon_dataset"),
    output:
        steps["energon_dataset"].manifest,
    threads: cfg.energon_dataset.workers
    resources:
        **asks("energon_dataset"),
    params:
        **call("energon_dataset"),
    shell:
        "python -m llava_steps.prepare_energon {params.flags:q} {quiet[energon_dataset]:q}"
