# Goes in: an image, and the field of another one of the same space (a lattice of control points). Comes out: what n4
# makes of a scan, under the same names, for the rows of the sheet that have field_from.


ruleorder: apply > n4


rule apply:
    """Divide the image by the field of another one, by world coordinates."""
    input:
        image=image_of,
        field=source_field_of,
        beside=beside_of,
    output:
        **CORRECTION,
    log:
        "<logs>/apply/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/apply/{folder}/{entities}_{suffix}.tsv"
    wildcard_constraints:
        entities=entities_pattern(scan for scan in SHEET if scan.field_from),
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=memory_mb(baseline=400, per_voxel=4),
    params:
        keep_dtype=config["output"]["keep_dtype"],
        package=package_digest("steps.apply"),
    script:
        "../scripts/apply.py"
