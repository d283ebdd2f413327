# The door: the workflow itself is in workflow/Snakefile. Here stand the defaults of a run.
import importlib.util
import shutil


include: "workflow/Snakefile"


if not SCANS:
    raise WorkflowError("config: samples: is empty; path of the sample sheet")

# Snakemake gives a resource no limit unless it is told one, and jobs on one GPU would share its memory.
# So where a GPU may be used, one n4 job runs at a time, and on the CPU none asks for one.
# --resources gpu=N overrides this.
if "gpu" not in workflow.global_resources:
    if config["device"] == "cpu":
        workflow.register_resource("gpu", 0)
    elif config["device"] == "gpu" or (shutil.which("nvidia-smi") and importlib.util.find_spec("cupy")):
        workflow.register_resource("gpu", 1)


rule default:
    """Everything: what `snakemake` makes if no target is named."""
    default_target: True
    input:
        rules.all.input,


onstart:
    check_places()
    # one broken scan must not keep the others from being done: --keep-going is the default here
    workflow.scheduler.keepgoing = True
    # and --scheduler greedy: an integer program over thousands of jobs takes minutes, and chooses no better
    if not any(word.startswith("--scheduler") for word in sys.argv):
        workflow.scheduler._job_selector = workflow.scheduler.job_selector_greedy


onerror:
    report_failures()
