"""The README's example in Python runs, and does what it says."""

import re

import numpy as np
import pytest

from n4flow.core.phantom import make_phantom


@pytest.fixture
def example(pytestconfig):
    text = (pytestconfig.rootpath / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return block


def test_the_example_in_python_runs_as_it_stands(example, tissues, tmp_path, monkeypatch):
    phantom = make_phantom(tissues[::2, ::2, ::2], 4.0, inu_percent=40, noise_percent=1, seed=1)
    names = {"volume": phantom.image, "mask": phantom.brain, "other": phantom.image[::2, ::2, ::2]}
    monkeypatch.chdir(tmp_path)
    lines = example.rstrip().splitlines()
    assert lines[-1].startswith("other / ")  # the last line's value is what is asked for
    exec("\n".join([*lines[:-1], f"divided = {lines[-1]}"]), names)
    assert (tmp_path / "field.json").is_file()
    # the field on twice the voxel size is the one on the image's own grid, at every second voxel
    at_every_second = names["result"].bias[::2, ::2, ::2]
    np.testing.assert_allclose(names["divided"], names["other"] / at_every_second, rtol=1e-5)
