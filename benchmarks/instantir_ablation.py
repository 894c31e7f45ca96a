"""What each part of InstantIR is good for, with the tiny weights: photographs restored with and without it, measured.

    python benchmarks/instantir_ablation.py --data BSDS500/val --niqe-parameters FILE --output benchmarks/results

Writes instantir_ablation.json (means) and instantir_previews.jpg: LQ, the previews of the steps, the result, the clean
photograph. The pictures are those of `fourfold evaluate` (centre crops of 256 px, each degraded by its index).
"""

import argparse
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path

WITHOUT = {  # row -> options of `restore`
    "InstantIR": {},
    "without Aggregator": {"conditioning_scale": 0.0},
    "without Previewer": {"preview_start": 1.0},  # the LQ latent is its own reference at every step
    "without DCP": {"image_scale": 0.0},
    "adaptive, as the paper": {"adaptive": "paper"},
    "adaptive, as released": {"adaptive": "release"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of clean photographs")
    parser.add_argument("--niqe-parameters", type=Path, help="NIQE's parameter file; without it NIQE is left out")
    parser.add_argument("--model", default="tiny", help='"tiny", or the folder export of a tiny training')
    parser.add_argument("--limit", type=int, default=30, help="photographs")
    parser.add_argument("--steps", type=int, default=2, help="of the sampling; with one the previews change nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    options = parser.parse_args()

    import torch
    from fourfold.commands.evaluate import format_table
    from fourfold.nodes.common.degradation import DEGRADATIONS
    from fourfold.nodes.common.evaluation import bicubic, evaluate, summarise, validation_pairs
    from fourfold.nodes.common.images import write_image
    from fourfold.nodes.common.metrics import load_metrics
    from fourfold.nodes.instantir.restore import load_system, restore

    torch.set_num_threads(options.threads)
    system = load_system(options.model, device="cpu")
    system.sampling = replace(system.sampling, steps=options.steps)
    metrics = load_metrics(niqe_parameters=options.niqe_parameters)
    pairs = validation_pairs(options.data, DEGRADATIONS["seesr"], limit=options.limit)
    rows = {"bicubic": bicubic}
    for name, changed in WITHOUT.items():
        rows[name] = lambda lr, seed, changed=changed: restore(lr, system, seed=seed, **changed)
    means = summarise(evaluate(pairs, rows, metrics))
    print(format_table(means, metrics))

    options.output.mkdir(parents=True, exist_ok=True)
    result = {"photographs": len(pairs), "settings": asdict(system.sampling), "means": means,
              "torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    (options.output / "instantir_ablation.json").write_text(json.dumps(result, indent=2) + "\n")
    sheet = torch.cat([_previews(system, restore, bicubic, pair) for pair in pairs[:4]], dim=-2)
    write_image(options.output / "instantir_previews.jpg", sheet, {"columns": "LQ, previews, result, clean"})


def _previews(system, restore, bicubic, pair):
    """LQ | preview of each step | result | clean, (1, 3, H, n W)."""
    import torch
    from fourfold.nodes.common.autoencoder import to_vae

    config, seen = system.network.config, []
    result = restore(pair.lr, system, seed=pair.index, on_sampled=lambda run: seen.extend(run.previews))
    pixels = [system.autoencoder.decode(to_vae(z, config.latent_shift, config.latent_scale)) for z in seen]
    height, width = result.shape[-2:]
    columns = [bicubic(pair.lr), *(p[..., :height, :width] for p in pixels), result, pair.hr]
    return torch.cat(columns, dim=-1).clamp(0, 1)


if __name__ == "__main__":
    main()
