"""The config, checked before anything runs; every problem is one line."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from n4flow.errors import InputError
from n4flow.parameters import N4Parameters
from n4flow.study.bids import Scan

#: One page shows so many corrections: more, nobody compares by eye.
TUNE_CORRECTIONS = 100

#: Keys of earlier configs, and what took their place.
REPLACED = {
    "reference.fraction": "give reference.scans, a number of scans, or all",
    "qc.flags.reference_r": "give reference_rms, the rms difference from SimpleITK at its defaults",
}


def load_schema(path: str | Path) -> dict[str, Any]:
    """Read a JSON schema that is written as YAML."""
    import yaml

    # the one in C, where there is one, takes a tenth of the time
    return yaml.load(Path(path).read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def load_config(path: str | Path) -> dict[str, Any]:
    """Read a config file.

    Raises
    ------
    InputError
        It cannot be read, or holds no keys.
    """
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(path, f"cannot be read ({error})", "give a config file in YAML") from None
    if not isinstance(config, dict):
        raise InputError(path, "holds no keys", "give a config file such as config/config.yaml")
    return config


def with_defaults(config: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the schema's defaults for every key that it does not give, in the schema's order.

    Snakemake compares the parameters of a job as text: the order of the keys in a file must not count.
    """
    filled = dict(config)
    for key, part in schema["properties"].items():
        if part.get("type") == "object" and "properties" in part:
            section = filled.get(key, {})
            value = with_defaults(section, part) if isinstance(section, Mapping) else section
            if value or key in filled:
                filled[key] = value
        elif "default" in part:
            filled.setdefault(key, part["default"])
    return {key: filled[key] for key in schema["properties"] if key in filled} | filled


def schema_problems(content: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    """What in a config or a row breaks its schema, in words."""
    import yaml
    from jsonschema import Draft202012Validator

    for error in sorted(Draft202012Validator(schema).iter_errors(content), key=lambda e: str(e.path)):
        place = ".".join(str(part) for part in error.path)
        if error.validator == "additionalProperties":
            known = error.schema["properties"]
            for key in sorted(set(error.instance) - set(known), key=str):
                near = difflib.get_close_matches(str(key), known, n=1)
                whole = ".".join(filter(None, [place, str(key)]))
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                yield f"{whole}: there is no such key; {REPLACED.get(whole, hint)}"
        else:
            told = f"{error.instance!r} does not fit" if error.validator == "pattern" else error.message
            message = told.replace("\n", " ")
            remedy = error.schema.get("description", "see config/README.md")
            is_text = error.schema.get("type") == "string"  # of a sheet: there is nothing to take for a number
            if isinstance(error.instance, str) and _is_number(error.instance) and not is_text:
                text, number = error.instance, _yaml_number(error.instance)
                # without quotes too: YAML 1.1 wants a point and a sign
                if isinstance(yaml.safe_load(text), str):
                    remedy += f" (YAML takes {text} for text: write {number} instead; "
                else:
                    remedy += f" (it is text here: write {number} without quotes; "
                remedy += "what --config has in braces is always text, so put it into a config file)"
            yield f"{place + ': ' if place else ''}{message}; {remedy}"


def _yaml_number(text: str) -> str:
    """A number as YAML 1.1 takes it for one."""
    number = float(text)
    whole = str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    return whole if "." in whole or "e" not in whole else whole.replace("e", ".0e")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def config_problems(config: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """What is wrong with the config, a line each."""
    found = list(schema_problems(config, schema))
    # what a schema cannot say: JSON's integers hold 4.0, and its numbers NaN
    found += [f"{key}: is no finite number; give one" for key, value in _leaves(config) if _not_finite(value)]
    if not found:
        try:
            N4Parameters.from_mapping(config.get("n4", {}))
        except InputError as error:
            found.append(str(error))
        else:
            # the same problem of several combinations is told once
            found += dict.fromkeys(_grid_problems(config, schema))
    return [" ".join(f"config: {problem}".split()) for problem in found]


def problems_by_file(config: Mapping[str, Any], schema: Mapping[str, Any], files: Sequence[str | Path]) -> list[str]:
    """As `config_problems`, each line beginning with the file that holds what is wrong, if one does.

    Parameters
    ----------
    config : mapping
        What the files and the command line say together.
    schema : mapping
    files : sequence of path-like
        Those that win come first.
    """
    found = config_problems(config, schema)
    of_file: dict[str, str | Path] = {}
    for path in files if found else ():
        with contextlib.suppress(InputError):  # by itself it says nothing
            of_file = dict.fromkeys(config_problems(load_config(path), schema), path) | of_file
    return [f"{of_file[line]}{line.removeprefix('config')}" if line in of_file else line for line in found]


def page_settings(qc: Mapping[str, Any]) -> dict[str, Any]:
    """What the section ``qc`` of the config says of pages, without what concerns the index alone."""
    limits = {name: limit for name, limit in qc["flags"].items() if name != "outlier_z"}
    return {key: qc[key] for key in ("field_window_log", "viewer_mb")} | {"flags": limits}


def grid_combinations(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """All combinations of a grid's values, by names that say them and are good in a path.

    Parameters
    ----------
    grid : mapping of str to sequence
        Values to try of each key of n4.

    Returns
    -------
    dict of str to dict
        Without a grid none.
    """

    def word(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, list) else str(value)

    every = itertools.product(*grid.values()) if grid else ()
    combinations = [dict(zip(grid, values, strict=True)) for values in every]
    return {"_".join(f"{key}-{word(value)}" for key, value in chosen.items()): chosen for chosen in combinations}


def _grid_problems(config: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the values of tune.grid, alone and together."""
    grid = config.get("tune", {}).get("grid", {})
    wrong = [
        f"tune.grid.{problem}"
        for key, values in grid.items()
        for value in values
        for problem in schema_problems({key: value}, schema["properties"]["n4"])
    ]
    yield from wrong
    if wrong or math.prod(map(len, grid.values())) > TUNE_CORRECTIONS:  # `tune_problems` tells of these
        return
    for name, chosen in grid_combinations(grid).items():
        if len(name) > 200:  # it is the name of a folder
            yield "tune.grid: has too many keys; put those with one value under n4"
            continue
        try:
            N4Parameters.from_mapping({**config.get("n4", {}), **chosen})
        except InputError as error:
            yield f"tune.grid: {name}: {error}"


def tune_problems(tune: Mapping[str, Any], scans: Sequence[Scan]) -> list[str]:
    """What is wrong with the config's tune beside the sheet, a line each."""
    subjects, grid = tune["subjects"], tune["grid"]
    own_field = [scan.subject for scan in scans if not scan.field_from]
    unknown = [label for label in subjects if label not in own_field]
    found = [
        f"tune.subjects: no scan of {label!r} in the sheet has a field of its own; give other labels"
        for label in unknown
    ]
    if bool(subjects) != bool(grid):
        found.append(f"tune.{'grid' if subjects else 'subjects'}: is empty; give both subjects and grid, or neither")
    chosen = sum(subject in subjects for subject in own_field)
    corrections = math.prod(map(len, grid.values())) * chosen
    if grid and corrections > TUNE_CORRECTIONS:
        found.append(
            f"tune: {chosen} scans with every combination are {corrections} corrections, more than the "
            f"{TUNE_CORRECTIONS} of a page; take fewer subjects or values"
        )
    return [f"config: {problem}" for problem in found]


def _leaves(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of a config, with its dotted key."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(content, list):
        for value in content:
            yield from _leaves(value, place)
    else:
        yield place, content


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
