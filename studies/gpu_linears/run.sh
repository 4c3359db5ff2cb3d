#!/usr/bin/env bash
# Times the linears of Llama-3-8B on the GPU of this machine:
#   studies/gpu_linears/run.sh OUT [STEP ...]        steps: cold1 warm again table cold2 uniform (all of them if none is named)
# The package must be importable by $PYTHON. Then, anywhere: python studies/gpu_linears/analyse.py OUT
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1; shift
steps=${*:-cold1 warm again table cold2 uniform}
python=${PYTHON:-python}
shapes=${SHAPES:-$here/shapes.txt} rows=1,16,2048
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export AUTOQUANT_CACHE=${AUTOQUANT_CACHE:-$work/caches}
mkdir -p "$out"
{ date -u +%F; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader; nproc; "$python" -c "
import torch, torchao, triton; print('torch', torch.__version__, 'torchao', torchao.__version__, 'triton', triton.__version__)
from importlib.metadata import version; print('gemlite', version('gemlite'))"; } >"$out/machine.txt" 2>/dev/null

profile() { "$python" -m autoquant profile --device cuda "$@"; }
stamped() { while IFS= read -r line; do echo "$SECONDS s: $line"; done; }
both() { # NAME DATABASE: the model's shapes for prefill 2,048 and decode at batch 1 and 16
    local start=$SECONDS
    profile --shapes "$shapes" --rows "$rows" --db "$2" --csv 2>&1 >"$out/$1.csv" | stamped >"$out/$1.log"
    echo "$1 $((SECONDS - start)) s" | tee -a "$out/seconds.txt"
}
for step in $steps; do
    case $step in
    cold1) both cold1 "$out/cold1.db" ;;                                  # nothing cached, nothing known
    warm) both warm "$work/warm.db" ;;                                    # kernels cached, nothing known
    again) both again "$out/cold1.db" ;;                                  # everything known
    cold2) rm -rf "$AUTOQUANT_CACHE"; both cold2 "$work/cold2.db" ;;
    table)
        start=$SECONDS
        # Groups of 32 and 64 are left out: they cost as many preparations as all the rest, and are never faster than 128.
        profile --shapes "$shapes" --rows 1,4,16,64,256,2048 --db "$out/cold1.db" --csv --plot "$out/latency.png" \
            --candidates 'float8*' --candidates 'int8*' --candidates 'int4-g128*' 2>&1 >"$out/table.csv" | stamped >"$out/table.log"
        echo "table $((SECONDS - start)) s" | tee -a "$out/seconds.txt"
        ;;
    uniform) "$python" "$here/torchao_uniform.py" --shapes "$shapes" >"$out/uniform.csv" ;;
    esac
done
