#!/usr/bin/env bash
# A whole search on the GPU of this machine, from command to recommended plan, then again for another limit:
#   studies/gpu_search/run.sh MODEL TEXT OUT [OPTION ...]
# MODEL is a Hugging Face folder, TEXT what quality is measured on; further options are the searches'. The package must be
# importable by $PYTHON.
set -euo pipefail
model=$1 text=$2 out=$3
shift 3
options=("$@")
python=${PYTHON:-python}
mkdir -p "$out"
export AUTOQUANT_CACHE=${AUTOQUANT_CACHE:-$(mktemp -d)}
search() { # NAME OPTION ...
    local start=$SECONDS name=$1
    "$python" -m autoquant search "$model" --device cuda --eval-text "$text" --db "$out/plan.db" --workload prefill=1024,decode=128 \
        --time-budget 6m --fuse "${options[@]}" "${@:2}" 2>&1 |
        while IFS= read -r line; do echo "$((SECONDS - start)) s: $line"; done >"$out/$name.log"
    echo "$name $((SECONDS - start)) s" | tee -a "$out/seconds.txt"
}
search first
search again --max-ppl-increase 0.3%
"$python" -m autoquant pareto "$out/plan.db" --json >"$out/pareto.json"
"$python" -m autoquant pareto "$out/plan.db" --plot "$out/front.png"
"$python" -c "
import json, statistics, sys
errors = [(row['predicted_request_ms'] / row['measured_request_ms'] - 1, row['label']) for row in json.load(open(sys.argv[1])) if row['kind'] != 'original']
for error, label in errors: print(f'{error:+7.1%}  {label}')
sizes = [abs(error) for error, _ in errors]
print(f'predicted over measured request time: median {statistics.median(sizes):.1%}, worst {max(sizes):.1%}, {len(sizes)} plans')
" "$out/pareto.json" | tee "$out/predicted.txt"
