# The door: the workflow itself is in workflow/Snakefile. Here stand the defaults of a run.
import shutil


include: "workflow/Snakefile"


# Snakemake gives a resource no limit unless it is told one, and two jobs on one GPU would share its
# memory. So a machine with a GPU runs one n4 job at a time, and one without runs them all on CPUs.
# --resources gpu=N overrides this.
if "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", int(config["device"] == "gpu" or bool(shutil.which("nvidia-smi"))))

# One broken scan must not keep the others from being done: --keep-going is the default.
if workflow.execution_settings:
    workflow.execution_settings.keep_going = True


rule default:
    """Everything: what `snakemake` makes if no target is named."""
    default_target: True
    input:
        rules.all.input,


onerror:
    report_failures()
