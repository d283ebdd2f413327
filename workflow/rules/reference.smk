# Goes in: an image, its mask, and how many iterations our correction took. Comes out: what SimpleITK makes of them with the equivalent
# parameters, in the same forms as ours. Only for the scans that config's reference.fraction selects.


rule reference:
    """Correct with SimpleITK, as the independent check."""
    input:
        image=image_of,
        mask=rules.mask.output.mask,
        sidecar=rules.n4.output.sidecar,
    output:
        corrected="<results>/{folder}/{entities}_desc-N4sitk_{suffix}.nii.gz",
        sidecar="<results>/{folder}/{entities}_desc-N4sitk_{suffix}.json",
        lattice="<results>/{folder}/{entities}_desc-N4sitk{suffix}_biasfield.json",
    log:
        "<logs>/reference/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/reference/{folder}/{entities}_{suffix}.tsv"
    conda:
        "../../envs/reference.yaml"
    resources:
        mem_mb=memory_mb(baseline=500, per_voxel=4, per_sample=200),
    params:
        settings=config["n4"],
        keep_dtype=config["output"]["keep_dtype"],
        package=package_digest("reference"),
    script:
        "../scripts/reference.py"
