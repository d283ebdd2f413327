# OME-Zarr. Goes in: a store that nothing holds as a whole. Comes out: a coarse volume of each channel, which goes through
# mask, n4, reference and qc like any other scan; and a store like the input, whose levels are divided part by part by the
# fields found there. Its root metadata is written last: until then, readers take it for none.


rule coarse:
    """Read the level of a channel that its field is estimated on."""
    input:
        lambda wildcards: files_of(scan_of(wildcards).image),
    output:
        image=OUTPUT["coarse"],
        sidecar=OUTPUT["coarse_sidecar"],
    log:
        "<logs>/coarse/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/coarse/{folder}/{entities}_{suffix}.tsv"
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: (SNAKEMAKE_MB + 600 + 16 * config["zarr"]["level_voxels"] // 10**6) * attempt,
    params:
        store=lambda wildcards: scan_of(wildcards).image,
        metadata=lambda wildcards: metadata_of(scan_of(wildcards).image),
        channel=lambda wildcards: scan_of(wildcards).channel,
        t=lambda wildcards: scan_of(wildcards).t,
        settings={key: config["zarr"][key] for key in ("level", "level_voxels", "offset", "pyramid_origin")},
        package=package_digest("steps.pyramid"),
    script:
        "../scripts/coarse.py"


rule given_mask:
    """Bring the mask of the sheet onto the grid of the coarse volume, by world coordinates."""
    input:
        image=OUTPUT["coarse"],
        mask=lambda wildcards: files_of(scan_of(wildcards).mask),
    output:
        mask=OUTPUT["given_mask"],
    log:
        "<logs>/given_mask/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/given_mask/{folder}/{entities}_{suffix}.tsv"
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=memory_mb(baseline=400, per_voxel=12),
    params:
        mask=lambda wildcards: scan_of(wildcards).mask,
        metadata=lambda wildcards: metadata_of(scan_of(wildcards).mask),
        t=lambda wildcards: scan_of(wildcards).t,
        pyramid_origin=config["zarr"]["pyramid_origin"],
        package=package_digest("steps.pyramid"),
    script:
        "../scripts/given_mask.py"


rule plan:
    """Make the arrays of the corrected store, empty, and say what each job divides."""
    input:
        lambda wildcards: files_of(store_of(wildcards).image.path),
    output:
        plan=STORE_OUTPUT["plan"],
    log:
        "<logs>/plan/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/plan/{folder}/{entities}_{suffix}.tsv"
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=500,
    params:
        store=lambda wildcards: store_of(wildcards).image.path,
        metadata=lambda wildcards: metadata_of(store_of(wildcards).image.path),
        target=target_of,
        settings={key: config["zarr"][key] for key in ("job_gb", "dtype", "pyramid_origin")},
        package=package_digest("steps.pyramid"),
    script:
        "../scripts/plan.py"


rule divide:
    """Divide a part of a level, whole shards or chunks that nobody else writes."""
    input:
        unpack(fields_of),
        store=lambda wildcards: files_of(store_of(wildcards).image.path),
        plan=rules.plan.output.plan,
    output:
        marker=STORE_OUTPUT["part"],
    log:
        "<logs>/divide/{folder}/{entities}_{suffix}/level-{level}_part-{part}.log",
    benchmark:
        "<benchmarks>/divide/{folder}/{entities}_{suffix}/level-{level}_part-{part}.tsv"
    wildcard_constraints:
        level=r"\d+",
        part=r"\d+",
    conda:
        "../../envs/n4.yaml"
    threads: 8
    resources:
        mem_mb=divide_mb,
        runtime=divide_minutes,
    params:
        store=lambda wildcards: store_of(wildcards).image.path,
        metadata=lambda wildcards: metadata_of(store_of(wildcards).image.path),
        target=target_of,
        channels=lambda wildcards: store_of(wildcards).channels(),
        saturated=config["zarr"]["saturated"],
        pyramid_origin=config["zarr"]["pyramid_origin"],
        package=package_digest("steps.pyramid"),
    script:
        "../scripts/divide.py"


rule describe:
    """Gather what was seen in the parts into the sidecar of the corrected store."""
    input:
        unpack(fields_of),
        masks=lambda wildcards: [made_of(scan, "mask") for scan in store_of(wildcards).scans],
        parts=lambda wildcards: parts_of(store_of(wildcards)),
    output:
        sidecar=STORE_OUTPUT["store_sidecar"],
    log:
        "<logs>/describe/{folder}/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/describe/{folder}/{entities}_{suffix}.tsv"
    wildcard_constraints:
        entities=entities_pattern(STORES),
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: (SNAKEMAKE_MB + 600 + 16 * config["zarr"]["level_voxels"] // 10**6) * attempt,
    params:
        store=lambda wildcards: store_of(wildcards).image.path,
        # of a store that lies elsewhere the sidecar says where
        notes=lambda wildcards: {"Store": target_of(wildcards)} if WRITE_TO else {},
        channels=lambda wildcards: store_of(wildcards).channels(),
        pyramid_origin=config["zarr"]["pyramid_origin"],
        package=package_digest("steps.pyramid"),
    script:
        "../scripts/describe.py"


rule finish:
    """Write the root metadata of the corrected store."""
    input:
        sidecar=rules.describe.output.sidecar,
    output:
        root=STORE_OUTPUT[ROOT],
    log:
        "<logs>/finish/{folder}/{entities}_{suffix}_{root}.log",
    benchmark:
        "<benchmarks>/finish/{folder}/{entities}_{suffix}_{root}.tsv"
    wildcard_constraints:
        root=r"zarr\.json|\.zattrs",
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=500,
    params:
        store=lambda wildcards: store_of(wildcards).image.path,
        target=target_of,
        pyramid_origin=config["zarr"]["pyramid_origin"],
        package=package_digest("steps.pyramid"),
    script:
        "../scripts/finish.py"


rule crops:
    """Draw the finest level before and after, where two parts meet, for the page of a channel."""
    input:
        unpack(crops_inputs),
    output:
        crops=OUTPUT["crops"],
    log:
        "<logs>/crops/{entities}_{suffix}.log",
    benchmark:
        "<benchmarks>/crops/{entities}_{suffix}.tsv"
    conda:
        "../../envs/qc.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: (SNAKEMAKE_MB + 900 + 8 * config["zarr"]["level_voxels"] // 10**6) * attempt,
    params:
        image=lambda wildcards: scan_of(wildcards).image,
        corrected=lambda wildcards: target_of_store(STORE_OF_SCAN[scan_of(wildcards).name]),
        channel=lambda wildcards: scan_of(wildcards).channel,
        t=lambda wildcards: scan_of(wildcards).t,
        pyramid_origin=config["zarr"]["pyramid_origin"],
        package=package_digest("qc.crops"),
    script:
        "../scripts/crops.py"
