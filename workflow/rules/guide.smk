# Goes in: the tissue maps that ship with the workflow. Comes out: the page that explains the others, by
# a simulated head that is corrected well and badly, with the limits and windows of this dataset.


rule guide:
    """Write how to read the pages, with six corrections that are broken on purpose."""
    input:
        tissues=workflow.source_path("../resources/mni152/tissues_2mm.nii.gz.base64"),
    output:
        page="<results>/qc/guide.html",
    log:
        "<logs>/guide.log",
    benchmark:
        "<benchmarks>/guide.tsv"
    conda:
        "../../envs/qc.yaml"
    resources:
        mem_mb=700,
    params:
        field_window_log=config["qc"]["field_window_log"],
        flags=page_settings(config["qc"])["flags"],
        package=package_digest("qc.guide"),
    script:
        "../scripts/guide.py"
