# Names that stand for several rules: tar_shards for that of every dataset, and a rule that a sweep
# has several times for all of them.

for group in this_run.groups:

    rule:
        name:
            group
        input:
            this_run.group_manifests(group),
