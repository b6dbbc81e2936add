# The pages about the run: its report, and the comparison of a sweep's variants. Each is copied beside
# the results, and into `snakemake --report`.

for step in this_run.pages():

    rule:
        name:
            step.name
        input:
            this_run.inputs(step.name),
        output:
            manifest=step.manifest,
            page=report(
                str(step.page),
                caption=f"../report/{step.kind}.rst",
                category="Run",
                labels={"run": step.settings.title},
            ),
        resources:
            **this_run.resources(step.name),
        params:
            command=this_run.command(step.name),
            made=str(step.out / step.page.name),
        shell:
            "{params.command:q} && cp -- {params.made:q} {output.page:q}"
