"""The parameters of the estimate, validated once, so that nothing below has to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from n4flow.errors import InputError


@dataclass(frozen=True)
class N4Parameters:
    """How the bias field is estimated; the defaults are the preset ``mri-head``.

    Parameters
    ----------
    mesh : {"fixed", "refined"}
        ``fixed`` keeps one mesh over all levels; ``refined`` doubles the spans between levels,
        as ITK does.
    spline_distance_mm : float
        Length of a mesh element (span) at the first level. Smaller follows the data more closely,
        and absorbs tissue contrast once it nears the size of anatomy.
    iterations : tuple of int
        The most iterations at each level.
    convergence_threshold : float
        A level ends when the coefficient of variation of ``exp`` of the update in the mask falls
        to this value; see `threshold_after`.
    strong_field_log : float or None
        Once the updates add up to more than this, the field is strong, and the threshold falls in
        proportion: going on then finds more of the field than it absorbs of the contrast. None: the
        threshold is the same for all fields, as ITK has it.
    spans : tuple of int, optional
        Mesh elements per axis at the first level, from the first to the last voxel, as ITK lays its
        mesh; instead of `spline_distance_mm`.
    shrink_factor : int
        The field is estimated on every n-th voxel along each axis (see `estimate.shrink_per_axis`).
    histogram_bins : int
        Bins of the log intensity histogram, from 10 to 30000.
    fwhm : float
        Full width at half maximum, in log intensity, of the Gaussian that is deconvolved (0.15 in
        Sled et al. 1998 and ITK). Narrower means smaller steps, that take less contrast along.
    wiener_noise : float
        Noise term of the Wiener filter.

    Raises
    ------
    InputError
        A value is of the wrong type or out of its range.

    References
    ----------
    Tustison et al. 2010, doi:10.1109/TMI.2010.2046908; Sled et al. 1998, doi:10.1109/42.668698.
    """

    mesh: Literal["fixed", "refined"] = "fixed"
    spline_distance_mm: float = 65.0
    iterations: tuple[int, ...] = (200,)
    convergence_threshold: float = 1e-3
    strong_field_log: float | None = 0.1
    spans: tuple[int, ...] | None = None
    shrink_factor: int = 4
    histogram_bins: int = 200
    fwhm: float = 0.12
    wiener_noise: float = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            several = name in ("iterations", "spans") and isinstance(value, Iterable)
            object.__setattr__(self, name, tuple(map(_plain, value)) if several else _plain(value))
        iterations: Any = self.iterations
        spans: Any = self.spans
        checks = {
            "mesh": (self.mesh in ("fixed", "refined"), "'fixed' or 'refined'"),
            "spline_distance_mm": (1e-9 <= _number(self.spline_distance_mm) <= 1e9, "a length from 1e-9 to 1e9"),
            "iterations": (
                isinstance(iterations, tuple) and len(iterations) > 0 and all(_whole(n) >= 1 for n in iterations),
                "a list of whole numbers from 1, one per level",
            ),
            "convergence_threshold": (
                _number(self.convergence_threshold) >= 0,
                "a number from 0",
            ),
            "strong_field_log": (
                self.strong_field_log is None or _number(self.strong_field_log) > 0,
                "a number above 0, or null",
            ),
            "spans": (
                spans is None or (isinstance(spans, tuple) and len(spans) == 3 and all(_whole(n) >= 1 for n in spans)),
                "three whole numbers from 1, one per axis",
            ),
            "shrink_factor": (_whole(self.shrink_factor) >= 1, "a whole number from 1"),
            "histogram_bins": (10 <= _whole(self.histogram_bins) <= 30000, "a whole number from 10 to 30000"),
            "fwhm": (1e-9 <= _number(self.fwhm) <= 1e3, "a number from 1e-9 to 1000"),
            "wiener_noise": (0 < _number(self.wiener_noise) <= 1e9, "a number above 0, up to 1e9"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise InputError(f"n4.{name}", f"{getattr(self, name)!r} is not valid", f"give {wanted}")

    def threshold_after(self, changes: Iterable[float]) -> float:
        """The convergence threshold after these updates.

        Parameters
        ----------
        changes : iterable of float
            Coefficients of variation of all updates so far: steps whose sum is the way that the log
            field has come, and at least its standard deviation in the mask (to first order).

        Returns
        -------
        float
        """
        way = math.fsum(changes)
        if self.strong_field_log is None or way <= self.strong_field_log:
            return self.convergence_threshold
        return self.convergence_threshold * self.strong_field_log / way

    @property
    def doublings(self) -> int:
        """How often the spans are doubled from the first level to the last."""
        return len(self.iterations) - 1 if self.mesh == "refined" else 0

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> N4Parameters:
        """Build from plain values, as they stand in a config file or a sidecar.

        The key ``preset`` names one of `PRESETS`; other keys win over what it sets, and a distance
        over its spans.

        Raises
        ------
        InputError
            A key is not known, or a value not valid.
        """
        known = {field.name for field in fields(cls)} | {"preset"}
        for name in mapping:
            if name not in known:
                raise InputError(f"n4.{name}", "there is no such key", f"choose from {', '.join(sorted(known))}")
        own = dict(mapping)
        preset = own.pop("preset", "mri-head")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError("n4.preset", f"{preset!r} is not known", f"choose from {', '.join(PRESETS)}")
        given = {**PRESETS[preset], **own}
        if "spline_distance_mm" in own and "spans" not in own:
            given.pop("spans", None)
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


#: Named settings: what each sets otherwise than the default. tests/benchmarks/ACCURACY.md measures them.
PRESETS: dict[str, dict[str, Any]] = {
    # one coarse mesh that stops in time: does next to nothing where there is no field
    "mri-head": {},
    # coarse to fine: each mesh goes on where the coarser one has stopped
    "mri-brain": {
        "mesh": "refined",
        "spline_distance_mm": 110.0,
        "iterations": (200, 200),
    },
    # many spans, for fields that vary within millimetres
    "microscopy": {"spline_distance_mm": 1.5},
    # what SimpleITK does if nothing is set
    "itk": {
        "mesh": "refined",
        "spans": (1, 1, 1),
        "iterations": (50, 50, 50, 50),
        "convergence_threshold": 1e-3,
        "strong_field_log": None,
        "fwhm": 0.15,
    },
    # what linumpy.gpu.n4 does if nothing is set: a fine mesh, all iterations
    "seed": {"spline_distance_mm": 10.0, "iterations": (25, 25, 25), "convergence_threshold": 0.0, "fwhm": 0.15},
}


def _plain(value: Any) -> Any:
    """A number of NumPy's as one of Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: object) -> float:
    """The value if it is a finite number, else NaN, which fails every comparison."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return value


def _whole(value: object) -> float:
    return value if isinstance(value, int) and not isinstance(value, bool) else math.nan
