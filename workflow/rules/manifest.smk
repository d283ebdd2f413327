# Goes in: everything that was made. Comes out: one file with its hashes, and the parameters and versions
# behind them. workflow/scripts/verify.py compares results with it, here or elsewhere.


# By their paths: beside rules.….output, Snakemake 9.27 takes a time for the other inputs that grows with their square.
OVER_ALL = ["dataset_description.json", ".bidsignore", "qc/guide.html", "qc/index.html", "qc/metrics.tsv"]
OVER_ALL += ["qc/metrics_mqc.tsv", "qc/distributions.png", "qc/worst.png", "qc/outliers.js", "qc/methods.md"]
OVER_ALL += ["qc/exclude.tsv", "qc/agreement.tsv"] if RATINGS_FILE else []
OVER_ALL = [f"<results>/{name}" for name in OVER_ALL + [f"qc/data/{name}.log" for name in FAILED]]
MANIFEST = "<results>/manifest.json"


rule manifest:
    """Write down what was made, so that a reprocessing can be compared."""
    input:
        scans=[path for scan in SCANS for path in products(scan).values()],
        dataset=OVER_ALL,
    output:
        manifest=MANIFEST,
    log:
        "<logs>/manifest.log",
    benchmark:
        "<benchmarks>/manifest.tsv"
    conda:
        "../../envs/n4.yaml"
    threads: 2
    resources:
        mem_mb=500,
    params:
        scans=[(scan.name, len(products(scan))) for scan in SCANS],
        failed=[tuple(failure) for failure in FAILED.values()],
        package=package_digest("study.manifest"),
    script:
        "../scripts/manifest.py"
