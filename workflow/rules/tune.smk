# Goes in: the scans of a few subjects and a grid of n4 keys (config's tune). Comes out: one page on which
# the corrections with every combination stand side by side. Apart from the results, and not part of all.

TUNE_FOLDER = "<results>/tune/{folder}/{entities}_{suffix}/{combination}"


wildcard_constraints:
    combination=r"[A-Za-z0-9_.+-]+",


rule tune_n4:
    """Correct a scan with one combination of the grid."""
    input:
        image=image_of,
        mask=rules.mask.output.mask,
        weights=weights_of,
        beside=beside_of,
    output:
        corrected=f"{TUNE_FOLDER}/corrected.nii.gz",
        sidecar=f"{TUNE_FOLDER}/corrected.json",
        field=f"{TUNE_FOLDER}/biasfield.json",
    log:
        "<logs>/tune/{folder}/{entities}_{suffix}/{combination}.log",
    benchmark:
        "<benchmarks>/tune/{folder}/{entities}_{suffix}/{combination}.tsv"
    conda:
        "../../envs/n4.yaml"
    resources:
        gpu=1,
        mem_mb=memory_mb(baseline=400, per_voxel=4, per_sample=250),
    params:
        settings=tune_settings,
        keep_dtype=False,
        plane_gains=config["plane_gains"],
        package=package_digest("steps.correct"),
    script:
        "../scripts/n4.py"


rule tune:
    """Compare corrections with different settings, side by side on one page."""
    input:
        unpack(tune_inputs),
    output:
        page="<results>/tune/index.html",
    log:
        "<logs>/tune.log",
    benchmark:
        "<benchmarks>/tune.tsv"
    conda:
        "../../envs/qc.yaml"
    resources:
        mem_mb=memory_mb(baseline=600, per_voxel=16),
    params:
        scans=[scan.name for scan in TUNED],
        referenced=TUNED_BESIDE,
        combinations=list(COMBINATIONS.values()),
        settings=config["n4"],
        field_window_log=config["qc"]["field_window_log"],
        flags=page_settings(config["qc"])["flags"],
        package=package_digest("qc.tune"),
    script:
        "../scripts/tune.py"
