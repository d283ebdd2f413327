# Goes in: an image and its mask, and weights if the sheet names them. Comes out: the corrected image, the field as a lattice of control
# points (JSON, a few kilobytes: all that later steps need of it) and, if wanted, as an image.


rule n4:
    """Estimate the bias field and divide the image by it."""
    input:
        image=image_of,
        mask=rules.mask.output.mask,
        weights=weights_of,
        beside=beside_of,
    output:
        **CORRECTION,
    log:
        "<logs>/n4/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/n4/{folder}/{entities}_{suffix}.tsv"
    wildcard_constraints:
        # of its names, one is also that of the sidecar of an OME-Zarr image
        entities=f"(?!{entities_pattern(STORES)}){WILDCARDS['entities']}",
    conda:
        "../../envs/n4.yaml"
    resources:
        gpu=1,
        mem_mb=memory_mb(baseline=400, per_voxel=4, per_sample=250),
    params:
        settings=config["n4"],
        keep_dtype=config["output"]["keep_dtype"],
        plane_gains=config["plane_gains"],
        package=package_digest("steps.correct"),
    script:
        "../scripts/n4.py"
