"""`fourfold evaluate`: degrade clean photographs, restore them, and measure the results against bicubic enlargement."""

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_text
from .options import METHODS, add_model_options, add_sampling_options, at_least, sampling_settings

if TYPE_CHECKING:
    from ..nodes.common.evaluation import Restorer, Row
    from ..nodes.common.metrics import Metric

SHEET_TILE = 256  # px


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("evaluate", help="measure methods on clean photographs", description=__doc__)
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER",
                        help="clean photographs, taken in sorted order")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeat for several (default: all)")
    parser.add_argument("--baseline-only", action="store_true", help="measure bicubic and the clean photographs only")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="only the first N photographs")
    parser.add_argument("--crop", type=at_least(4), default=256, help="side of the centre crop, px (default: 256)")
    parser.add_argument("--degradation", default="seesr", metavar="NAME",
                        help="seesr, real_esrgan or light; photograph i is degraded with seed i (default: seesr)")
    parser.add_argument("--batch", type=at_least(1), default=1, help="photographs per call; changes the time only")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (default: torch's)")
    parser.add_argument("--niqe-parameters", type=Path, metavar="FILE.mat",
                        help="NIQE's parameter file; without it and without a copy in pyiqa's cache NIQE is left out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write scores.csv and summary.json there")
    parser.add_argument("--sheet", type=at_least(1), nargs="?", const=8, metavar="N",
                        help="with --out: also sheet.png, bicubic | methods | clean of the first N photographs (8)")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluates, prints the means, writes what was asked for. Returns 0 whatever the numbers say."""
    import torch

    from ..nodes.common.degradation import DEGRADATIONS
    from ..nodes.common.evaluation import BICUBIC, CLEAN, bicubic, evaluate, summarise, validation_pairs
    from ..nodes.common.metrics import MEASURES, load_metrics
    from ..nodes.common.verdict import judge
    from .checks import check_options
    from .methods import Method

    if options.degradation not in DEGRADATIONS:
        raise ValueError(f"unknown degradation {options.degradation!r}; there are {', '.join(DEGRADATIONS)}.")
    if options.sheet and options.out is None:
        raise ValueError("--sheet needs --out, the folder to write it to.")
    methods = [] if options.baseline_only else options.method or list(METHODS)
    check_options(options, methods)
    if options.threads:
        torch.set_num_threads(options.threads)
    metrics = load_metrics(niqe_parameters=options.niqe_parameters)
    left_out = [MEASURES[name].label for name in MEASURES if name not in metrics]
    pairs = validation_pairs(options.data, DEGRADATIONS[options.degradation], crop=options.crop, limit=options.limit)
    restorers: dict[str, Restorer] = {BICUBIC: bicubic, **{name: Method(name, options) for name in methods}}

    shown: dict[int, dict[str, torch.Tensor]] = {pair.index: {} for pair in pairs[:options.sheet or 0]}

    def keep(pair, method, picture):
        if pair.index in shown and method != CLEAN:
            shown[pair.index][method] = picture

    with _progress(len(pairs) * len(restorers)) as bar:
        rows = evaluate(pairs, restorers, metrics, batch=options.batch, on_picture=keep,
                        on_row=lambda row: bar.update(row.method != CLEAN))
    for pair in pairs[:len(shown)]:
        shown[pair.index][CLEAN] = pair.hr
    means = summarise(rows)
    verdicts = {name: judge(means, name) for name in methods}

    print(f"{len(pairs)} photographs, centre crops of {options.crop} px, degradation {options.degradation}, x4")
    print(format_table(means, metrics))
    if left_out:
        print(f"left out: {', '.join(left_out)} (no parameter file; see --niqe-parameters)")
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}", *(f"  {reason}" for reason in verdict.reasons), sep="\n")
    if options.out is not None:
        summary = {"data": str(options.data), "photographs": len(pairs), "crop": options.crop,
                   "degradation": options.degradation, "model": options.model,
                   "captioner": options.captioner, "settings": sampling_settings(options),
                   "torch": torch.__version__, "left_out": left_out,
                   "means": {method: _defined(scores) for method, scores in means.items()},
                   "verdicts": {name: {"passed": v.passed, "reasons": v.reasons,
                                       "not_measured": v.not_measured} for name, v in verdicts.items()}}
        _write(options.out, as_csv(rows, metrics), summary, list(shown.values()))
    return 0


def _write(out: Path, scores: str, summary: dict, shown: list[dict]) -> None:
    from .sheet import write_sheet

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "scores.csv", scores)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    if shown:
        write_sheet(out / "sheet.png", shown, cell=SHEET_TILE)
    print(f"written to {out}")


def format_table(means: Mapping[str, Mapping[str, float]], metrics: Mapping[str, "Metric"]) -> str:
    """Means as text: a line a method, an arrow for the better direction, a dash where a measure does not apply."""
    columns = {f"{metric.measure.label} {'↓' if metric.measure.lower_better else '↑'}": (name, metric.measure.decimals)
               for name, metric in metrics.items()}
    if any("seconds" in scores for scores in means.values()):
        columns["s"] = ("seconds", 2)
    header = ["method", *columns]
    lines = [header]
    for method, scores in means.items():
        lines.append([method, *(_number(scores.get(name), decimals) for name, decimals in columns.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(line, widths, strict=True))) for line in lines)


def as_csv(rows: list["Row"], metrics: Mapping[str, "Metric"]) -> str:
    """One line a picture and method; an empty cell where a measure does not apply or is undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "name", "method", *metrics, "seconds"])
    for row in rows:
        scores = [row.scores.get(name) for name in metrics]
        cells = ["" if score is None or score != score else f"{score:.6g}" for score in scores]
        writer.writerow([row.index, row.name, row.method, *cells, f"{row.seconds:.4f}"])
    return text.getvalue()


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None or value != value else f"{value:.{decimals}f}"


def _defined(scores: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN: what no picture defines becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}


def _progress(total: int):
    from tqdm import tqdm

    return tqdm(total=total, unit="picture", file=sys.stderr, disable=not sys.stderr.isatty())
