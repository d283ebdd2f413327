# Goes in: the images of several scans. Comes out: masks and corrections, and then pages, each scan's in a folder of its
# own under results/.batches, from where the scan's own jobs put them in place. One process does all of a batch, since to
# start one (and a GPU) takes about as long as the work on a scan.
#
# The batches are the sheet in pieces of config's batch, without the scans that a batch has dealt with as they are: so
# a scan that is added, or has changed, takes no other one with it, and no batch hangs on what became of another. The job
# of a batch fails only if it is killed as a whole.

for number, scans in FIELD_BATCHES.items():

    rule:
        name:
            f"fields_{number}"
        input:
            images=[scan.image for scan in scans],
            masks=[scan.mask for scan in scans if scan.mask],
        output:
            [directory(batch_folder("fields", scan)) for scan in scans],
        log:
            f"<logs>/batches/fields_{number}.log",
        benchmark:
            f"<benchmarks>/batches/fields_{number}.tsv"
        retries: 2
        conda:
            "../../envs/n4.yaml"
        resources:
            gpu=1,
            mem_mb=memory_mb(baseline=400, per_voxel=4, per_sample=80),
            attempt=attempt_of,
        params:
            scans=[field_entry(scan) for scan in scans],
            settings=FIELD_SETTINGS,
        script:
            "../scripts/fields.py"


for number, scans in PAGE_BATCHES.items():

    rule:
        name:
            f"pages_{number}"
        input:
            images=[scan.image for scan in scans],
            fields=[batch_folder("fields", scan) for scan in scans],
        output:
            [directory(batch_folder("pages", scan)) for scan in scans],
        log:
            f"<logs>/batches/pages_{number}.log",
        benchmark:
            f"<benchmarks>/batches/pages_{number}.tsv"
        retries: 2
        conda:
            "../../envs/qc.yaml"
        resources:
            mem_mb=memory_mb(baseline=600, per_voxel=16),
            attempt=attempt_of,
        params:
            scans=[page_entry(scan) for scan in scans],
            settings=SETTINGS["qc"],
        script:
            "../scripts/pages.py"


# What a profile or the command line sets for n4 and qc (--set-resources, --set-threads) is meant for those that do their
# work, too. A workflow that imports this one may have given the rules other names, or have taken only some of them.
for step, kind, batches in (("n4", "fields", FIELD_BATCHES), ("qc", "pages", PAGE_BATCHES)):
    asked, name_of_step = workflow.resource_settings, workflow.modifier.modify_rulename(step)
    given, threads = asked.overwrite_resources.get(name_of_step, {}), asked.overwrite_threads.get(name_of_step)
    for name in (workflow.modifier.modify_rulename(f"{kind}_{number}") for number in batches):
        if workflow.is_rule(name):
            workflow.get_rule(name).resources.update(given)
            if threads is not None:
                workflow.get_rule(name).resources["_cores"] = threads
