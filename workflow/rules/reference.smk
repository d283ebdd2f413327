# Goes in: an image and its mask. Comes out: what SimpleITK makes of them at its defaults, in the same forms as ours, and how near
# our own arithmetic comes to it with the same settings. Only for so many scans as config's reference.scans says, and those of tune.


rule reference:
    """Correct with SimpleITK at its defaults: another estimate to look at, and the check of our arithmetic."""
    input:
        image=image_of,
        mask=rules.mask.output.mask,
        # nothing is read from it: SimpleITK is to take no time for a scan that n4 refuses
        sidecar=ancient(rules.n4.output.sidecar),
        beside=beside_of,
    output:
        corrected=OUTPUT["reference"],
        sidecar=OUTPUT["reference_sidecar"],
        field=OUTPUT["reference_field"],
    log:
        "<logs>/reference/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/reference/{folder}/{entities}_{suffix}.tsv"
    conda:
        "../../envs/reference.yaml"
    resources:
        mem_mb=memory_mb(baseline=500, per_voxel=8),
    params:
        keep_dtype=config["output"]["keep_dtype"],
        plane_gains=config["plane_gains"],
        package=package_digest("steps.reference"),
    script:
        "../scripts/reference.py"
