# The built-in dataset. Goes in: tissue maps that ship with the workflow. Comes out: four heads with
# known fields, which config/samples.tsv points to, and the truth beside them.


rule demo:
    """Simulate four subjects with 0, 20, 40 and 100 % intensity non-uniformity."""
    input:
        tissues=workflow.source_path("../resources/mni152/tissues_2mm.nii.gz.base64"),
    output:
        images=DEMO_IMAGES,
        mask=DEMO_MASK,
        truth=DEMO_TRUTH,
        description=f"{DEMO_ROOT}/dataset_description.json",
    log:
        "<logs>/demo.log",
    benchmark:
        "<benchmarks>/demo.tsv"
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=500,
    params:
        package=package_digest("steps.demo"),
    script:
        "../scripts/demo.py"
