"""The parameters of the estimate, validated once, so that nothing below has to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from n4flow.errors import InputError

#: The estimate takes no more than so many of the box of a mask, unless a shrink factor is set: it is to take no second.
MOST_SAMPLES = 2**20


class Stage(NamedTuple):
    """What an iteration does in one stage of the estimate."""

    most_iterations: int
    fwhm: float
    twicing: float


@dataclass(frozen=True)
class N4Parameters:
    """How the bias field is estimated.

    Parameters
    ----------
    fit : {"penalised", "lee-wolberg-shin"}
        How a spline is fitted to what sharpening leaves: ``penalised`` least squares, which resist bending and are
        exact for any mask, or the one-step approximation that ITK has.
    stiffness : float
        For the penalised fit: what bending costs, beside the residual of a sample.
    mesh : {"fixed", "refined"}
        ``fixed`` keeps one mesh over all stages; ``refined`` doubles the spans between stages, as ITK does, and goes
        with ``lee-wolberg-shin`` alone.
    spans : tuple of int, optional
        Mesh elements per axis at the first stage, at most one between two samples of the mask where `domain` is
        ``mask``; (4, 4, 4) unless there is a `spline_distance_mm`.
    domain : {"mask", "image"}
        Where `spans` lie: from the first to the last sample of the mask, or from the first to the last voxel of the
        image, as ITK lays its mesh.
    spline_distance_mm : float, optional
        Length of a mesh element (span) at the first stage, instead of `spans`; such a mesh is centred on the image.
    iterations : tuple of int
        The most iterations, a number for each stage.
    fwhm : float or tuple of float
        Full width at half maximum, in log intensity, of the Gaussian that is deconvolved (0.15 in Sled et al. 1998
        and ITK); a number for all stages, or one for each. A wide one finds strong fields, a narrow one spares
        contrast.
    strong_fwhm : float, optional
        Width of one more stage before the first, for strong fields: where the first is slow, it is tried, and counts if
        it leaves the corrected histogram sharper, see `estimate.SLOW_START`. For the penalised fit, and where it is
        wider than the first stage.
    twicing : float or tuple of float
        How much of what the expected value still lacks is added to it, from 0 to 1, two times over; a number for all
        stages, or one for each. It takes out the pull between tissues, and of a strong field a part, so that it rises
        as the width falls; 0 is the expected value of Sled et al.
    convergence_threshold : float
        A stage ends when the coefficient of variation of ``exp`` of the update in the mask falls to this value.
    shrink_factor : int, optional
        The field is estimated on every n-th voxel along each axis (see `samples.shrink_per_axis`); by default on as
        many as a second allows.
    denoise : float
        A sample is the mean of itself and those of its 26 neighbours that differ by no more than so many standard
        deviations of the noise; 0 takes it as it is.
    histogram_bins : int
        Bins of the log intensity histogram, from 10 to 30000.
    wiener_noise : float
        Noise term of the Wiener filter.

    Raises
    ------
    InputError
        A value is of the wrong type or out of its range, or two do not go together.

    References
    ----------
    Tustison et al. 2010, doi:10.1109/TMI.2010.2046908; Sled et al. 1998, doi:10.1109/42.668698.
    """

    fit: Literal["penalised", "lee-wolberg-shin"] = "penalised"
    stiffness: float = 2e-6
    mesh: Literal["fixed", "refined"] = "fixed"
    spans: tuple[int, ...] | None = None
    domain: Literal["mask", "image"] = "mask"
    spline_distance_mm: float | None = None
    iterations: tuple[int, ...] = (40, 40, 40, 40, 40, 40)
    fwhm: float | tuple[float, ...] = (0.20, 0.16, 0.13, 0.105, 0.085, 0.07)
    strong_fwhm: float | None = 0.45
    twicing: float | tuple[float, ...] = (0.45, 0.54, 0.63, 0.72, 0.81, 0.9)
    convergence_threshold: float = 1e-3
    shrink_factor: int | None = None
    denoise: float = 1.5
    histogram_bins: int = 200
    wiener_noise: float = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            several = name in ("iterations", "spans", "fwhm", "twicing") and isinstance(value, Iterable)
            object.__setattr__(self, name, tuple(map(_plain, value)) if several else _plain(value))
        if self.spans is None and self.spline_distance_mm is None:
            object.__setattr__(self, "spans", (4, 4, 4))
        iterations: Any = self.iterations
        spans: Any = self.spans
        widths, shares = (value if isinstance(value, tuple) else (value,) for value in (self.fwhm, self.twicing))
        checks = {
            "fit": (self.fit in ("penalised", "lee-wolberg-shin"), "'penalised' or 'lee-wolberg-shin'"),
            "stiffness": (1e-9 <= _number(self.stiffness) <= 1e9, "a number from 1e-9 to 1e9"),
            "mesh": (self.mesh in ("fixed", "refined"), "'fixed' or 'refined'"),
            "spans": (
                spans is None or (isinstance(spans, tuple) and len(spans) == 3 and all(_whole(n) >= 1 for n in spans)),
                "three whole numbers from 1, one per axis",
            ),
            "domain": (self.domain in ("mask", "image"), "'mask' or 'image'"),
            "spline_distance_mm": (
                self.spline_distance_mm is None or 1e-9 <= _number(self.spline_distance_mm) <= 1e9,
                "a length from 1e-9 to 1e9",
            ),
            "iterations": (
                isinstance(iterations, tuple) and len(iterations) > 0 and all(_whole(n) >= 1 for n in iterations),
                "a list of whole numbers from 1, one per stage",
            ),
            "fwhm": (
                len(widths) > 0 and all(1e-9 <= _number(width) <= 1e3 for width in widths),
                "a number from 1e-9 to 1000, or a list of them, one per stage",
            ),
            "strong_fwhm": (
                self.strong_fwhm is None or 1e-9 <= _number(self.strong_fwhm) <= 1e3,
                "a number from 1e-9 to 1000, or null",
            ),
            "twicing": (
                len(shares) > 0 and all(0 <= _number(share) <= 1 for share in shares),
                "a number from 0 to 1, or a list of them, one per stage",
            ),
            "convergence_threshold": (
                _number(self.convergence_threshold) >= 0,
                "a number from 0",
            ),
            "shrink_factor": (
                self.shrink_factor is None or _whole(self.shrink_factor) >= 1,
                "a whole number from 1, or null",
            ),
            "denoise": (0 <= _number(self.denoise) <= 100, "a number from 0 to 100"),
            "histogram_bins": (10 <= _whole(self.histogram_bins) <= 30000, "a whole number from 10 to 30000"),
            "wiener_noise": (0 < _number(self.wiener_noise) <= 1e9, "a number above 0, up to 1e9"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise InputError(f"n4.{name}", f"{getattr(self, name)!r} is not valid", f"give {wanted}")
        if self.spans and self.spline_distance_mm:
            raise InputError("n4.spans", "stands beside n4.spline_distance_mm", "give one of the two")
        if self.fit == "penalised" and self.mesh == "refined":
            raise InputError(
                "n4.mesh",
                "a refined mesh does not go with the penalised fit, which needs but one",
                "set n4.mesh to fixed or n4.fit to lee-wolberg-shin",
            )
        self._check_stages()

    def _check_stages(self) -> None:
        """Refuse lists of other numbers of stages than that of `iterations`."""
        count = len(self.iterations)
        lists = {
            f"n4.{name}": len(value) for name in ("fwhm", "twicing") if isinstance(value := getattr(self, name), tuple)
        }
        wrong = {name: length for name, length in lists.items() if length != count}
        if not wrong:
            return
        names = " and ".join(wrong)
        remedies = [f"{names} for {count}: a number, or a list of {count}"]
        if len(set(lists.values())) == 1:  # so many iterations go with all that is there
            length = next(iter(lists.values()))
            such = [*self.iterations, *[self.iterations[-1]] * length][:length]
            remedies.insert(0, f"n4.iterations for {length}, such as {such}")
            others = f"{names} {'is' if len(wrong) == 1 else 'are'} for {length}"
        else:
            others = ", ".join(f"{name} is for {length}" for name, length in wrong.items())
        stages = "1 stage" if count == 1 else f"{count} stages"
        raise InputError("n4.iterations", f"is for {stages}, {others}", f"give {', or '.join(remedies)}")

    @property
    def stages(self) -> list[Stage]:
        """The stages, in their order."""
        count = len(self.iterations)
        widths, shares = (
            value if isinstance(value, tuple) else (value,) * count for value in (self.fwhm, self.twicing)
        )
        return [Stage(*stage) for stage in zip(self.iterations, widths, shares, strict=True)]

    @property
    def strong_stage(self) -> Stage | None:
        """The one before the first, for strong fields; None where there is none."""
        first = self.stages[0]
        if self.fit != "penalised" or self.strong_fwhm is None or self.strong_fwhm <= first.fwhm:
            return None
        return first._replace(fwhm=self.strong_fwhm)

    @property
    def as_itk(self) -> bool:
        """Whether the histogram is sharpened exactly as ITK does it, see `sharpening.expected_log_values`."""
        return self.fit == "lee-wolberg-shin" and not any(stage.twicing for stage in self.stages)

    @property
    def refinements(self) -> int:
        """How often the spans are doubled from the first stage to the last."""
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
        preset = own.pop("preset", "default")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError("n4.preset", f"{preset!r} is not known", f"choose from {', '.join(PRESETS)}")
        values = {**PRESETS[preset], **own}
        for distance, other in (("spline_distance_mm", "spans"), ("spans", "spline_distance_mm")):
            if own.get(distance) is not None and own.get(other) is None:
                values.pop(other, None)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


#: Named settings: what each sets otherwise than the default. tests/benchmarks/ACCURACY.md measures them.
PRESETS: dict[str, dict[str, Any]] = {
    # a stiff field on one mesh, found with a width that narrows
    "default": {},
    # what SimpleITK does if nothing is set
    "itk": {
        "fit": "lee-wolberg-shin",
        "mesh": "refined",
        "spans": (1, 1, 1),
        "domain": "image",
        "iterations": (50, 50, 50, 50),
        "fwhm": 0.15,
        "twicing": 0.0,
        "shrink_factor": 4,
        "denoise": 0.0,
    },
    # what linumpy.gpu.n4 does if nothing is set: a fine mesh, all iterations
    "linumpy": {
        "fit": "lee-wolberg-shin",
        "spline_distance_mm": 10.0,
        "domain": "image",
        "iterations": (25, 25, 25),
        "fwhm": 0.15,
        "twicing": 0.0,
        "convergence_threshold": 0.0,
        "shrink_factor": 4,
        "denoise": 0.0,
    },
    # one mesh, one width, ITK's fit
    "fixed": {
        "fit": "lee-wolberg-shin",
        "iterations": (200,),
        "fwhm": 0.12,
        "twicing": 0.0,
        "shrink_factor": 4,
        "denoise": 0.0,
    },
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
