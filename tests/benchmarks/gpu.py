"""What the array code needs on the GPU and on the CPU for the same estimate; see gpu.sh."""

import statistics
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "workflow" / "scripts"), str(REPOSITORY)]

from n4flow import N4Parameters  # noqa: E402
from n4flow.device import select_device  # noqa: E402
from n4flow.estimate import estimate_field  # noqa: E402
from n4flow.phantom import make_phantom  # noqa: E402
from tests.conftest import TISSUES, samples_of  # noqa: E402


def main():
    """Measure and print the table."""
    device = select_device("gpu")
    parameters = N4Parameters(shrink_factor=1, iterations=(40,), convergence_threshold=0)
    print(f"{device.name}; 40 iterations, medians of 5 runs in turns\n")
    print(
        "| voxels in the mask | CPU | GPU | CPU / GPU | log fields differ by at most |\n| --- | --- | --- | --- | --- |"
    )
    for repeat in (1, 2):
        tissues = np.asarray(nib.load(TISSUES).dataobj).repeat(repeat, 0).repeat(repeat, 1).repeat(repeat, 2)
        head = make_phantom(tissues, 2.0 / repeat, inu_percent=40, noise_percent=3, seed=1)
        samples = samples_of(head.image, head.image > 300, (2.0 / repeat,) * 3)
        fields, times = {}, {np: [], device.xp: []}
        for run in range(6):
            for xp, taken in times.items():
                start = time.perf_counter()
                fields[xp] = estimate_field(samples, parameters, xp=xp).field.log_at(samples.positions)
                if run:  # the first warms up
                    taken.append(time.perf_counter() - start)
        cpu, gpu = (statistics.median(taken) for taken in times.values())
        worst = np.abs(fields[np] - fields[device.xp]).max()
        print(f"| {samples.mask.sum()} | {cpu:.3f} s | {gpu:.3f} s | {cpu / gpu:.1f} | {worst:.0e} |")


if __name__ == "__main__":
    main()
