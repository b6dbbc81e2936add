# Sharding in several jobs, as `cluster.jobs` asks for it: each writes a share, tar_shards joins them.

if this_run.shares:

    rule tar_shards_part:
        """A share of the work of tar_shards."""
        input:
            this_run.inputs("tar_shards"),
        output:
            temp(this_run.share_manifest("{share}")),
        threads: this_run.rules["tar_shards"].threads
        resources:
            **this_run.resources("tar_shards"),
        params:
            command=this_run.share_command,
        shell:
            "{params.command:q}"
