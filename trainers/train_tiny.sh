#!/usr/bin/env bash
# Rebuilds the tiny family from a folder of photographs, on a laptop in a night, and puts it in its place.
#
#     trainers/train_tiny.sh PHOTOGRAPHS OUT [options of the trainings, e.g. --num_workers 4]
#
# OUT takes the runs (logs, checkpoints, sample pictures). Started again after an interruption, it goes on where it was.
# PYTHON is the interpreter (default: python), CHECKPOINTS the folder for the results (default: the suite's own),
# INSTANCES the folder of the photographs' label maps, which InstanceRSR needs: without it, it is left out.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
photographs=$1 out=$2
shift 2
python=${PYTHON:-python}
mkdir -p "$out"

if [ ! -f "$out/codec.safetensors" ]; then
    "$python" -m fourfold.trainers.fit_codec --photographs "$photographs" --output "$out/codec.safetensors"
fi

newest() { # the newest export of a training
    ls -d "$out/$1"/checkpoints/step-*/export | sort | tail -n 1
}
train() { # train NAME TRAINER [options]: into a folder of that name; goes on where it was
    local name=$1 trainer=$2
    shift 2
    "$python" -m "fourfold.trainers.$trainer" --photographs "$photographs" --output_dir "$out/$name" \
        --sample_every 1000 --resume latest "$@"
}

train dit4sr train_dit4sr --preset tiny --codec "$out/codec.safetensors" "$@"
train vision train_tiny_vision "$@"

parts=(--codec "$out/codec.safetensors" --text "$(newest dit4sr)/text.safetensors")
train base train_tiny_sdxl "${parts[@]}" "$@"
parts+=(--preset tiny --vision "$(newest vision)/vision.safetensors")
train dcp train_instantir_dcp "${parts[@]}" --start "$(newest base)/base.safetensors" "$@"
train previewer train_instantir_previewer "${parts[@]}" --start "$(newest dcp)/instantir_tiny.safetensors" "$@"
train aggregator train_instantir_aggregator "${parts[@]}" --start "$(newest previewer)/instantir_tiny.safetensors" "$@"

if [ -n "${INSTANCES:-}" ]; then
    train instancersr train_instancersr --preset tiny --instances "$INSTANCES" --codec "$out/codec.safetensors" \
        --vision "$(newest vision)/vision.safetensors" "$@"
fi

"$python" -m fourfold.trainers.place_tiny --codec "$out/codec.safetensors" --dit4sr "$out/dit4sr" \
    --vision "$out/vision" --instantir "$out/aggregator" ${INSTANCES:+--instancersr "$out/instancersr"} \
    ${CHECKPOINTS:+--checkpoints "$CHECKPOINTS"}

cat <<END
How good it is, measured against bicubic on photographs that were not trained on:
    fourfold evaluate --data VALIDATION_PHOTOGRAPHS --method dit4sr --out $out/evaluation --sheet
    fourfold evaluate --data VALIDATION_PHOTOGRAPHS --method instantir --out $out/evaluation --sheet
END
