# Goes in: an image and its mask. Comes out: the corrected image, the field as a lattice of control
# points (JSON, a few kilobytes: all that later steps need of it) and, if wanted, as an image.


rule n4:
    """Estimate the bias field and divide the image by it."""
    input:
        image=image_of,
        mask=rules.mask.output.mask,
        batch=field_batch_of("mask", "n4"),
    output:
        **CORRECTION,
    log:
        "<logs>/n4/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/n4/{folder}/{entities}_{suffix}.tsv"
    conda:
        "../../envs/n4.yaml"
    resources:
        gpu=gpus_of_n4,
        mem_mb=memory_mb(baseline=400, per_voxel=4, per_sample=80),
        attempt=attempt_of,
    params:
        **SETTINGS["n4"],
    script:
        "../scripts/n4.py"
