# Goes in: an image and its mask. Comes out: the corrected image, the field as a lattice of control
# points (JSON, a few kilobytes: all that later steps need of it) and, if wanted, as an image.


rule n4:
    """Estimate the bias field and divide the image by it."""
    input:
        image=image_of,
        mask=rules.mask.output.mask,
    output:
        **(
            {"bias": "<results>/{folder}/{entities}_desc-N4{suffix}_biasfield.nii.gz"}
            if config["output"]["bias_field"]
            else {}
        ),
        corrected="<results>/{folder}/{entities}_desc-N4_{suffix}.nii.gz",
        sidecar="<results>/{folder}/{entities}_desc-N4_{suffix}.json",
        lattice="<results>/{folder}/{entities}_desc-N4{suffix}_biasfield.json",
    log:
        "<logs>/n4/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/n4/{folder}/{entities}_{suffix}.tsv"
    conda:
        "../../envs/n4.yaml"
    resources:
        gpu=1,
        mem_mb=memory_mb(baseline=400, per_mb=20),
    params:
        settings=config["n4"],
        keep_dtype=config["output"]["keep_dtype"],
        package=package_digest("derivatives"),
    script:
        "../scripts/n4.py"
