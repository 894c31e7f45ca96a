#!/usr/bin/env bash
# Rebuilds the tiny family from a folder of photographs, on a laptop in a few hours, and puts it in its place.
#
#     trainers/train_tiny.sh PHOTOGRAPHS OUT [options of the trainings, e.g. --num_workers 4]
#
# OUT takes the runs (logs, checkpoints, sample pictures). Started again after an interruption, it goes on where it was.
# PYTHON is the interpreter (default: python), CHECKPOINTS the folder for the results (default: the suite's own).
set -euo pipefail

if [ "$#" -lt 2 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
photographs=$1 out=$2
shift 2
python=${PYTHON:-python}
mkdir -p "$out"

if [ ! -f "$out/codec.safetensors" ]; then
    "$python" -m fourfold.trainers.fit_codec --photographs "$photographs" --output "$out/codec.safetensors"
fi

"$python" -m fourfold.trainers.train_dit4sr --preset tiny --photographs "$photographs" --codec "$out/codec.safetensors" \
    --output_dir "$out/dit4sr" --sample_every 1000 --resume latest "$@"

"$python" -m fourfold.trainers.place_tiny --codec "$out/codec.safetensors" --dit4sr "$out/dit4sr" \
    ${CHECKPOINTS:+--checkpoints "$CHECKPOINTS"}

cat <<END
How good it is, measured against bicubic on photographs that were not trained on:
    fourfold evaluate --data VALIDATION_PHOTOGRAPHS --method dit4sr --out $out/evaluation --sheet
END
