"""Whether a method clears the bar that the tiny family has to clear, from the means of an evaluation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .evaluation import BICUBIC, CLEAN
from .metrics import MEASURES

STRUCTURE, FIDELITY = ("ssim", "fsim", "gmsd", "nlpd"), ("psnr", "psnr_rgb")


@dataclass(frozen=True)
class Verdict:
    """Whether a method clears the bar of the tiny family, and why (not); one sentence a condition.

    passed: every condition that could be looked at holds; False if none could.
    reasons: of these conditions, each beginning with "pass" or "FAIL".
    not_measured: labels of the measures of the bar that are not there, and so neither passed nor failed.
    """

    passed: bool
    reasons: tuple[str, ...]
    not_measured: tuple[str, ...] = ()

    def __str__(self) -> str:
        bar = "clears the bar" if self.passed else "does not clear the bar"
        if not self.not_measured:
            return bar
        if not self.reasons:
            return f"nothing of the bar was measured ({', '.join(self.not_measured)})"
        return f"{bar}{' as far as it was measured' if self.passed else ''} (not measured: " \
               f"{', '.join(self.not_measured)})"


def judge(means: Mapping[str, Mapping[str, float]], method: str, baseline: str = BICUBIC) -> Verdict:
    """The bar: better than bicubic on three of SSIM, FSIM, GMSD and NLPD; at most 0.5 dB of PSNR lost; NIQE nearer to
    the clean photographs' than bicubic's.

    A measure that is not there (left out, or defined for no picture) is neither passed nor failed, and named. Of the
    four of structure, three must be better even if fewer than four were measured; it is failed once that is impossible.
    """
    ours, theirs, clean = means[method], means[baseline], means.get(CLEAN, {})
    known = [name for name in (*STRUCTURE, *FIDELITY) if _defined(name, ours, theirs)]
    if _defined("niqe", ours, theirs, clean):
        known.append("niqe")
    conditions = []
    better = [name for name in STRUCTURE if name in known
              and (ours[name] < theirs[name] if MEASURES[name].lower_better else ours[name] > theirs[name])]
    worse = [name for name in STRUCTURE if name in known and name not in better]
    if len(better) >= 3 or len(worse) >= 2:
        labels = ", ".join(MEASURES[name].label for name in better) or "none"
        conditions.append((len(better) >= 3,
                           f"better than {baseline} on {len(better)} of SSIM, FSIM, GMSD, NLPD ({labels})"))
    for name in FIDELITY:
        if name in known:
            gain = ours[name] - theirs[name]
            conditions.append((gain >= -0.5, f"{MEASURES[name].label} {gain:+.2f} dB"))
    if "niqe" in known:
        distance, allowed = abs(ours["niqe"] - clean["niqe"]), abs(theirs["niqe"] - clean["niqe"])
        found = f"NIQE {distance:.2f} from the clean photographs' ({baseline}: {allowed:.2f})"
        conditions.append((distance < allowed, found))
    reasons = tuple(f"{'pass' if good else 'FAIL'}: {text}" for good, text in conditions)
    missing = tuple(MEASURES[name].label for name in (*STRUCTURE, *FIDELITY, "niqe") if name not in known)
    return Verdict(bool(conditions) and all(good for good, _ in conditions), reasons, missing)


def _defined(name: str, *scores: Mapping[str, float]) -> bool:
    return all(math.isfinite(score.get(name, float("nan"))) for score in scores)
