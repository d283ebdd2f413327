# The door: the workflow itself is in workflow/Snakefile, and what a run has by default in profiles/default.
include: "workflow/Snakefile"


if not SHEET:
    raise WorkflowError("config: samples: is empty; path of the sample sheet")


rule default:
    """Everything: what `snakemake` makes if no target is named."""
    default_target: True
    input:
        rules.all.input,
