"""Feed the readers of what comes from outside with damaged files, and keep those that they do not refuse in order.

python tests/fuzz/fuzz.py header --seconds 600 --seed 1 --keep /tmp/found

Whatever a file holds, a reader takes it or raises InputError of one line per problem: every other exception is a
defect, and so is memory beyond the limit. A file that shows one is kept, and its message printed. What was found
stands as tests in tests/unit/test_hostile.py.
"""

import argparse
import gzip
import json
import logging
import random
import resource
import string
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "workflow" / "scripts"))

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import yaml  # noqa: E402

from n4flow.core.field import BiasField, Mesh  # noqa: E402
from n4flow.errors import InputError  # noqa: E402
from n4flow.images.fields import load_field  # noqa: E402
from n4flow.images.nifti import Volume  # noqa: E402
from n4flow.parameters import N4Parameters  # noqa: E402
from n4flow.study.config import config_problems, load_schema, tune_problems, with_defaults  # noqa: E402
from n4flow.study.sheet import read_sheet  # noqa: E402

MEMORY_BYTES = 6 * 2**30

#: What breaks readers: limits of types, what means something to a shell, a path or a parser.
NUMBERS = [0, 1, -1, 2, 7, 127, 255, 32767, -32768, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, 2**64, 10**400, 0.5, 1e308]
NUMBERS += [-0.0, 1e-308, 5e-324, float("nan"), float("inf"), float("-inf"), 348, 540, 1032]
WORDS = ["", " ", "\t", "\n", "\r", "\0", "\x85", "\u2028", "\ufeff", "'", '"', '"""', "$(touch x)", "`x`", ";", "|"]
WORDS += ["../", "/", "//", "/etc/passwd", "~", ".", "..", "{x}", "<y>", "%s", "{0}", "\\", "a" * 4000, "ä", "e\u0301"]
WORDS += ["日", "🧠", "\ud800", "-", "_", "sub-", "T1w", "NaN", "null", "true", "!!python/object/apply:os.system [x]"]
WORDS += [
    "&a",
    "*a",
    "1e5",
    "0x1f",
    "1_000",
    "yes",
    "? ",
    "- ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    "<<: ",
    "#",
    ".nii",
    ".nii.gz",
]
WORDS += ["01", "run-1"]


def text_of(rng):
    """A word of the list, or several, or random letters."""
    choice = rng.random()
    if choice < 0.6:
        return rng.choice(WORDS)
    if choice < 0.8:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 4)))
    return "".join(rng.choices(string.printable, k=rng.randint(0, 20)))


def value_of(rng, depth=0):
    """Any value that JSON or YAML can hold."""
    choice = rng.random()
    if depth < 3 and choice < 0.15:
        return [value_of(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    if depth < 3 and choice < 0.25:
        return {text_of(rng): value_of(rng, depth + 1) for _ in range(rng.randint(0, 3))}
    if choice < 0.6:
        return rng.choice(NUMBERS)
    if choice < 0.9:
        return text_of(rng)
    return rng.choice([None, True, False])


def changed_bytes(content, rng):
    """The content with some bytes flipped, set, cut out, doubled or put in."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8, 40])):
        place = rng.randrange(len(content) + 1)
        length = rng.choice([1, 1, 2, 4, 8, rng.randint(1, 400)])
        kind = rng.randrange(6)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = content[place : place + length] * rng.randint(1, 3)
        elif kind == 4:
            content[place : place + length] = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * length
        else:
            content[place:place] = text_of(rng).encode("utf-8", "surrogatepass")
    return bytes(content)


def changed_object(content, rng):
    """A copy of a nest of lists and mappings with one value replaced, taken out or added, at any depth."""
    content = json.loads(json.dumps(content))
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys) if keys else None
        inner = place[key] if keys else None
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            place = inner
            continue
        kind = rng.random()
        if key is None or kind < 0.1:
            if isinstance(place, dict):
                place[text_of(rng)] = value_of(rng)
            else:
                place.append(value_of(rng))
        elif kind < 0.2:
            del place[key]
        else:
            place[key] = value_of(rng)
        return content


class Sheet:
    """The sample sheet: what is taken must stay in the folder of results."""

    def __init__(self, folder):
        self.path = folder / "sheet.tsv"
        self.schema = load_schema(ROOT / "workflow/schemas/samples.schema.yaml")
        self.image = folder / "a.nii"
        self.image.touch()

    def make(self, rng):
        columns = ["subject", "session", "image", "mask", "modality", "field_from"]
        cells = [
            ["01", "a", str(self.image), "", "T1w", ""],
            ["01", "a", str(self.image), str(self.image), "run-1_T2w", "T1w"],
        ]
        for _ in range(rng.randint(0, 3)):
            cells[rng.randrange(2)][rng.randrange(6)] = text_of(rng)
        content = "\n".join("\t".join(row) for row in [columns, *cells]).encode("utf-8", "surrogatepass")
        return changed_bytes(content, rng) if rng.random() < 0.6 else content

    def read(self):
        for scan in read_sheet(self.path, self.schema):
            path = f"{scan.folder}/{scan.name}_desc-foreground_mask.json"
            assert ".." not in path
            assert path.isascii()
            assert len(path) - len(scan.folder) < 250
            assert Path(scan.image).is_file()


class Config:
    """The config: problems are lines, and what has none can be worked with."""

    def __init__(self, folder):
        self.path = folder / "config.yaml"
        self.schema = load_schema(ROOT / "workflow/schemas/config.schema.yaml")
        self.text = (ROOT / "config/config.yaml").read_bytes()
        self.good = yaml.safe_load(self.text)
        self.good["n4"] |= N4Parameters().to_mapping()
        self.good["tune"] = {"subjects": ["01"], "grid": {"fwhm": [0.1, 0.2], "iterations": [[5], [5, 5]]}}

    def make(self, rng):
        if rng.random() < 0.3:
            return changed_bytes(self.text, rng)
        content = self.good
        for _ in range(rng.randint(1, 4)):
            content = changed_object(content, rng)
        return yaml.safe_dump(content).encode()

    def read(self):
        try:
            config = yaml.safe_load(self.path.read_bytes())
        except (yaml.YAMLError, ValueError, RecursionError):  # Snakemake's own to tell
            return
        if not isinstance(config, dict):
            return
        problems = config_problems(config, self.schema)
        assert all("\n" not in line for line in problems)
        if not problems:
            filled = with_defaults(config, self.schema)
            N4Parameters.from_mapping(filled["n4"])
            tune_problems(filled["tune"], [])


class Header:
    """NIfTI images, all of whose voxels are read."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "x.nii"
        self.good = []
        for kind in (nib.Nifti1Image, nib.Nifti2Image):
            for order in "<>":
                for shape in ((5, 4, 3), (5, 4), (5, 4, 3, 2)):
                    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
                    image = kind(values, np.diag([2.0, 2, 2, 1]), kind.header_class(endianness=order))
                    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
                    self.good.append(image.to_bytes())

    def make(self, rng):
        content = bytearray(rng.choice(self.good))
        size = 348 if content[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") else 540
        if rng.random() < 0.5:  # a field of the header, with a number that breaks readers
            kind = nib.Nifti1Header if size == 348 else nib.Nifti2Header
            header = kind(bytes(content[:size]), check=False)
            for _ in range(rng.randint(1, 3)):
                name = rng.choice(header.keys())
                field = header._structarr[name]
                numbers = np.array([rng.choice(NUMBERS[:-4])], dtype=object)
                if field.dtype.kind in "iuf":
                    with np.errstate(all="ignore"):
                        number = np.float64(numbers[0] if abs(numbers[0]) < 1e300 else 1e300)
                        value = np.clip(number, -9e18, 9e18).astype(field.dtype)
                    if field.ndim:
                        field[rng.randrange(len(field))] = value
                    else:
                        header._structarr[name] = value
            content[:size] = header.binaryblock
        else:
            content[:size] = changed_bytes(content[:size], rng)
        content = bytes(content)
        if rng.random() < 0.2:
            content = changed_bytes(content, rng)
        if rng.random() < 0.3:
            content = gzip.compress(content, 1)
            if rng.random() < 0.5:
                content = changed_bytes(content, rng)
        return content

    def read(self):
        compressed = self.path.with_name("x.nii.gz")
        if self.path.read_bytes()[:2] == b"\x1f\x8b":
            self.path.replace(compressed)
            path = compressed
        else:
            path = self.path
        volume = Volume(path)
        for _slab, _frame, values in volume.slabs(2):
            assert values.ndim == 3
        assert volume.mean().shape == volume.shape


class Lattice:
    """Fields, which are evaluated on another image where they are taken."""

    def __init__(self, folder):
        self.path = folder / "field.json"
        mesh = Mesh.of_distance((20, 18, 16), (4, 4, 4), 40.0)
        numbers = np.random.default_rng(0).normal(0, 0.1, mesh.lattice_shape)
        self.field = BiasField(numbers, mesh, (20, 18, 16), np.diag([4.0, 4, 4, 1]))
        self.good = self.field.to_mapping()
        self.text = json.dumps(self.good).encode()

    def make(self, rng):
        choice = rng.random()
        if choice < 0.3:
            return changed_bytes(self.text, rng)
        if choice < 0.32:
            return b"[" * rng.choice([10, 1000, 100_000]) + self.text
        content = self.good
        for _ in range(rng.randint(1, 3)):
            content = changed_object(content, rng)
        return json.dumps(content).encode("utf-8", "surrogatepass")

    def read(self):
        field = load_field(self.path)
        other = field.on_grid((9, 8, 7), np.diag([8.0, 8, 8, 1]), "other")
        assert other.ratio_tile((slice(None), slice(None), slice(0, 2))).shape == (9, 8, 2)
        assert load_field(self.path).to_mapping() == field.to_mapping()


TARGETS = {"sheet": Sheet, "config": Config, "header": Header, "lattice": Lattice}


def main():
    """Fuzz one reader for some time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that show a defect")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("ignore")
    logging.disable()
    rng = random.Random(given.seed)
    seen, count, taken, end = {}, 0, 0, time.monotonic() + given.seconds
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[given.target](Path(folder))
        while time.monotonic() < end:
            content = target.make(rng)
            target.path.write_bytes(content)
            count += 1
            start = time.monotonic()
            try:
                target.read()
                taken += 1
            except InputError as error:
                if given.target != "sheet" and "\n" in str(error):
                    print("more than a line:", repr(str(error)))
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                key = (type(error).__name__, frame.filename, frame.lineno)
                if key not in seen:
                    print(f"{count}: {type(error).__name__}: {str(error)[:300]} ({frame.filename}:{frame.lineno})")
                    traceback.print_exc()
                    if given.keep:
                        given.keep.mkdir(parents=True, exist_ok=True)
                        (given.keep / f"{given.target}-{len(seen)}").write_bytes(content)
                seen[key] = seen.get(key, 0) + 1
            if time.monotonic() - start > 5:
                print(f"{count}: took {time.monotonic() - start:.1f} s")
                if given.keep:
                    given.keep.mkdir(parents=True, exist_ok=True)
                    (given.keep / f"{given.target}-slow-{count}").write_bytes(content)
    print(f"{given.target}: {count} files, {taken} taken, {len(seen)} defects, seed {given.seed}")
    sys.exit(bool(seen))


if __name__ == "__main__":
    main()
