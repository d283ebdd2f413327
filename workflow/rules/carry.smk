# Goes in: what lies beside a raw series and says what its frames are (.bval, .bvec, aslcontext.tsv), its own or
# inherited. Comes out: the same bytes, where the corrected series inherits them: its frames are the same.


rule carry:
    """Carry b values, gradient directions or the context of ASL along to the corrected series."""
    input:
        carried_of,
    output:
        "<results>/{folder}/{entities}_{suffix}{end}",
    log:
        "<logs>/carry/{folder}/{entities}_{suffix}{end}.log",
    benchmark:
        "<benchmarks>/carry/{folder}/{entities}_{suffix}{end}.tsv"
    wildcard_constraints:
        end=r"\.bval|\.bvec|context\.tsv",
    conda:
        "../../envs/n4.yaml"
    resources:
        mem_mb=300,
    shell:
        "cp {input:q} {output:q} 2> {log:q}"
