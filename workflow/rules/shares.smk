# Sharding in several jobs, as `cluster.jobs` asks for it: each writes a share, which the rule of the
# dataset joins.

for step in map(this_run.rules.get, this_run.shares):

    rule:
        name:
            f"{step.name}_part"
        input:
            this_run.inputs(step.name),
        output:
            temp(this_run.share_manifest(step.name, "{share}")),
        threads: step.threads
        resources:
            **this_run.resources(step.name),
        params:
            command=this_run.share_command(step.name),
        shell:
            "{params.command:q}"
