# Goes in: everything the chain made of a scan. Comes out: a page per scan with its metrics, the
# report over all scans, and what makes the results a BIDS dataset.


rule qc:
    """Draw the panels of a scan, measure it and write its page."""
    input:
        unpack(qc_inputs),
    output:
        **PAGE,
    log:
        "<logs>/qc/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/qc/{entities}_{suffix}.tsv"
    conda:
        "../../envs/qc.yaml"
    resources:
        mem_mb=memory_mb(baseline=600, per_voxel=16),
    params:
        settings=page_settings(config["qc"]),
        crops=crops_of,
        package=package_digest("qc.pages"),
    script:
        "../scripts/qc.py"


rule index:
    """Gather the metrics of all scans into a table and the report's first page."""
    input:
        metrics=[made_of(scan, "metrics") for scan in SCANS],
        pages=[made_of(scan, "page") for scan in SCANS],
        # by its path: see manifest.smk
        guide="<results>/qc/guide.html",
        pictures=[made_of(scan, "pictures") for scan in SCANS],
        crops=[made_of(scan, "crops") for scan in SCANS if scan.name in STORE_FILES],
        ratings=RATINGS_FILE,
    output:
        page="<results>/qc/index.html",
        table=report(
            "<results>/qc/metrics.tsv",
            caption="../report/metrics.rst",
            category="All scans",
            labels={"what": "metrics", "kind": "table"},
        ),
        multiqc="<results>/qc/metrics_mqc.tsv",
        outliers="<results>/qc/outliers.js",
        methods=report(
            "<results>/qc/methods.md",
            caption="../report/methods.rst",
            category="All scans",
            labels={"what": "methods, to paste", "kind": "text"},
        ),
        bundle=report(
            directory(BUNDLE),
            htmlindex="index.html",
            caption="../report/index.rst",
            category="All scans",
            # a sign stands before letters, and so the report first
            labels={"what": "▸ the report, with a page per scan", "kind": "pages"},
        ),
        logs=[f"<results>/qc/data/{name}.log" for name in FAILED],
    log:
        "<logs>/index.log",
    benchmark:
        "<benchmarks>/index.tsv"
    conda:
        "../../envs/qc.yaml"
    resources:
        mem_mb=500,
    params:
        failed=[tuple(failure) for failure in FAILED.values()],
        outlier_z=config["qc"]["flags"]["outlier_z"],
        limits=page_settings(config["qc"])["flags"],
        groups={scan.name: dict(scan.groups) for scan in SCANS if scan.groups},
        package=package_digest("qc.dataset"),
    script:
        "../scripts/index.py"


rule figures:
    """Draw the distributions of the metrics and the worst scans."""
    input:
        metrics=[made_of(scan, "metrics") for scan in SCANS],
        pictures=[made_of(scan, "pictures") for scan in SCANS],
    output:
        distributions=report(
            "<results>/qc/distributions.png",
            caption="../report/distributions.rst",
            category="All scans",
            labels={"what": "distributions of the metrics", "kind": "figure"},
        ),
        worst=report(
            "<results>/qc/worst.png",
            caption="../report/worst.rst",
            category="All scans",
            labels={"what": "the worst scans", "kind": "figure"},
        ),
    log:
        "<logs>/figures.log",
    benchmark:
        "<benchmarks>/figures.tsv"
    conda:
        "../../envs/qc.yaml"
    resources:
        mem_mb=500,
    params:
        failed=[tuple(failure) for failure in FAILED.values()],
        outlier_z=config["qc"]["flags"]["outlier_z"],
        package=package_digest("qc.figures"),
    script:
        "../scripts/figures.py"


if RATINGS_FILE:

    rule exclude:
        """List the scans that a reviewer failed, and how raters agree."""
        input:
            ratings=RATINGS_FILE,
            metrics=[made_of(scan, "metrics") for scan in SCANS],
        output:
            table=report(
                "<results>/qc/exclude.tsv",
                caption="../report/exclude.rst",
                category="All scans",
                labels={"what": "scans that a reviewer failed", "kind": "table"},
            ),
            raters=report(
                "<results>/qc/agreement.tsv",
                caption="../report/agreement.rst",
                category="All scans",
                labels={"what": "agreement of the raters", "kind": "table"},
            ),
        log:
            "<logs>/exclude.log",
        benchmark:
            "<benchmarks>/exclude.tsv"
        conda:
            "../../envs/qc.yaml"
        resources:
            mem_mb=300,
        params:
            package=package_digest("study.ratings"),
        script:
            "../scripts/exclude.py"


rule dataset:
    """Describe the results as a BIDS derivative dataset."""
    input:
        # where they lie is all that counts
        sources=ancient([file_of(path) for scan in SHEET for path in scan.paths if not is_remote(path)]),
    output:
        description="<results>/dataset_description.json",
        bidsignore="<results>/.bidsignore",
    log:
        "<logs>/dataset.log",
    benchmark:
        "<benchmarks>/dataset.tsv"
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=300,
    params:
        package=package_digest("study.bids"),
    script:
        "../scripts/dataset.py"
