"""The dataset's metrics as custom content of MultiQC, for those who gather their reports there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import escape

from n4flow.images.files import atomic_text
from n4flow.qc.definitions import DEFINITIONS

#: What is on show at first; the other columns wait behind MultiQC's button.
VISIBLE = (
    "n_flags", "cjv_before", "cjv_after", "foreground_cv_before", "foreground_cv_after", "inu_range", "field_min",
    "field_max", "reference_r", "flags",
)  # fmt: skip


def multiqc_path(table: str | Path) -> Path:
    """Where the file for MultiQC lies: it finds custom content by the end of its name, ``_mqc.tsv``."""
    return Path(table).with_name(f"{Path(table).stem}_mqc.tsv")


def write_multiqc(
    subjects: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, int]], path: str | Path
) -> None:
    """Write a table of MultiQC's custom content: YAML in comment lines, then tab-separated values.

    Parameters
    ----------
    subjects : sequence of mappings
        Metrics by key, with ``name`` and ``flags``.
    columns : sequence of (key, heading, digits)
        Those that no subject has are left out.
    path : path-like

    References
    ----------
    MultiQC documentation, "Custom content" (version 1.35 was tried).
    """
    shown = [column for column in columns if any(values.get(column[0]) is not None for values in subjects)]
    with atomic_text(path) as file:
        file.writelines(f"# {line}\n" for line in _header(shown))
        file.write("\t".join(["Sample", "n_flags", *(key for key, *_ in shown), "flags"]) + "\n")
        for values in subjects:
            flags = [flag.partition(":")[0] for flag in values["flags"]]
            cells = [values.get("name"), len(flags), *(values.get(key) for key, *_ in shown), " ".join(flags) or None]
            # neither tab nor line end inside a cell, and MultiQC shows it as HTML
            file.write("\t".join("" if cell is None else escape(" ".join(str(cell).split())) for cell in cells) + "\n")


def _header(columns: Sequence[tuple[str, str, int]]) -> Iterator[str]:
    text = json.dumps  # a JSON string is a YAML string, whatever is in it
    described = {key: f"{d.name}: {d.formula}. {d.reading}" for d in DEFINITIONS for key in d.keys}
    yield "id: n4flow"
    yield "section_name: N4 bias correction"
    yield 'description: "Metrics in the mask, before and after correction; the pages are in qc/index.html."'
    yield "plot_type: table"
    yield "pconfig:"
    yield "    id: n4flow_metrics"
    yield "    title: N4 bias correction"
    yield "    namespace: n4flow"
    yield "    no_violin: true"
    yield "headers:"
    headings = [("n_flags", "flags", "number of automatic flags", "{:,.0f}")]
    headings += [
        (key, heading, described[key], "" if key == "field_from" else f"{{:,.{digits}f}}")
        for key, heading, digits in columns
    ]
    headings += [("flags", "which", "the names of the flags; the page of the scan has them in words", "")]
    for key, heading, description, form in headings:
        yield f"    {key}:"
        yield f"        title: {text(heading, ensure_ascii=False)}"
        yield f"        description: {text(description, ensure_ascii=False)}"
        if form:
            yield f"        format: {text(form)}"
        yield "        scale: false"
        if key not in VISIBLE:
            yield "        hidden: true"
