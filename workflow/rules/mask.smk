# Goes in: an image, and the user's own mask if the sheet names one, or the image to find it on. Comes out: a uint8 mask on the
# image's grid. The names of masks and fields hold the suffix of their image (foregroundT1w), since a
# subject may have several contrasts on different grids.


rule mask:
    """Find the foreground, or check and adopt the mask of the sample sheet."""
    input:
        image=image_of,
        own=own_mask_of,
        found_on=mask_image_of,
        beside=beside_of,
    output:
        mask=OUTPUT["mask"],
        sidecar=OUTPUT["mask_sidecar"],
    log:
        "<logs>/mask/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/mask/{folder}/{entities}_{suffix}.tsv"
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=memory_mb(baseline=300, per_voxel=2),
    params:
        settings=config["mask"],
        plane_gains=config["plane_gains"],
        package=package_digest("steps.mask"),
    script:
        "../scripts/mask.py"
