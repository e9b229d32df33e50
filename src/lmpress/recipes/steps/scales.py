"""Steps that move scales between what makes an input and what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from lmpress.families import BlockLayout, Site
from lmpress.methods.awq import AwqOptions, Reader, awq_scales
from lmpress.recipes.steps.base import Junction, Positive, SiteRewritten, SiteStep, Step, forms_before
from lmpress.statistics import Channels


class Awq(SiteStep):
    """Larger weights for inputs that are large, before a step rounds them: AWQ (arXiv 2306.00978).

    The inverse goes into the norm or the linear in front, and the dense model computes the same. The grid is
    that of the `quantize` that follows.

    Attributes:
        points: powers of the inputs' magnitudes that are tried for each site, beside 0.
    """

    kind: ClassVar[str] = "awq"
    targets: Literal["linears", "attention", "mlp"] = "linears"
    points: Positive = AwqOptions.points

    @property
    def needs_hessian(self) -> bool:
        return True

    def conflict(self, earlier: Sequence[Step]) -> str | None:
        if any(s.kind == self.kind for s in earlier):
            return "inputs are scaled once: let the targets of two awq not overlap"
        before = forms_before(earlier)
        return f"awq comes before {before} of the same modules" if before else None

    def lacks(self, later: Sequence[Step]) -> str | None:
        if any(step.grid() is not None for step in later):
            return None
        return "awq scales weights for a `quantize` of the same modules, and none follows"

    def sites(self, block: BlockLayout) -> tuple[Site, ...]:
        wanted = set(block.group(self.targets))
        return tuple(site for site in block.sites if site.feed and wanted.issuperset(site.linears))

    def rewrite_site(self, junction: Junction) -> SiteRewritten | None:
        if junction.statistics is None or junction.feed is None:
            raise ValueError("awq needs calibration text, and something that feeds the site")
        readers = []
        for linear, weight in junction.readers.items():
            for step in junction.later[linear]:
                grid = step.grid()
                if grid is not None:
                    readers.append(Reader(weight, grid, weighed=step.needs_statistics))
                    break
        if not readers:
            return None
        scale, report = awq_scales(readers, junction.statistics, self.told(AwqOptions), junction.feed.heads)
        if not report["alpha"]:
            return SiteRewritten(junction.readers, Channels(), None, report)
        weights = {
            linear: weight.float() * scale.to(weight.device) for linear, weight in junction.readers.items()
        }
        return SiteRewritten(weights, Channels(scale=1.0 / scale), None, report)
