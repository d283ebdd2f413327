# Goes in: everything that was made. Comes out: one file with its hashes, and the parameters and versions
# behind them. workflow/scripts/verify.py compares results with it, here or elsewhere.


rule manifest:
    """Write down what was made, so that a reprocessing can be compared."""
    input:
        scans=[path for scan in SCANS for path in products(scan).values()],
        dataset=[
            *rules.dataset.output,
            rules.guide.output.page,
            rules.index.output.page,
            rules.index.output.table,
            rules.index.output.multiqc,
            *rules.figures.output,
            *(rules.exclude.output if RATINGS_FILE else []),
        ],
    output:
        manifest="<results>/manifest.json",
    log:
        "<logs>/manifest.log",
    benchmark:
        "<benchmarks>/manifest.tsv"
    conda:
        "../../envs/n4.yaml"
    threads: 4
    resources:
        mem_mb=500,
    params:
        scans=[(scan.name, len(products(scan))) for scan in SCANS],
        package=package_digest("manifest"),
    script:
        "../scripts/manifest.py"
