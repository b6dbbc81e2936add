# One rule for each step of the table. Input is what other steps show and files of the user; output
# is the manifest of the result in results/<run>/<rule>/; the command can be pasted into a shell.
#
# A training on several nodes has no `container`: srun starts its command on each node, and each of
# these enters the image. A training that was killed resumes from its last checkpoint in the store.

for step in this_run.rules.values():
    if step.page:
        continue

    rule:
        name:
            step.name
        input:
            this_run.inputs(step.name),
            this_run.share_manifests(step.name),
        output:
            step.manifest,
        # Report what a stage cannot read before another stage has spent its time.
        priority: 1 if step.kind == "audit" else 0
        container:
            this_run.container(step.name)
        threads: step.threads
        resources:
            **this_run.resources(step.name),
        params:
            command=this_run.command(step.name),
        shell:
            "{params.command:q}"
