"""How far request times were from their predictions, over all plans of this study and of gpu_search
that have both.

python studies/gpu_whole_model/errors.py
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    errors = {}
    for path in sorted((HERE / "results").glob("rows-*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if "prediction_error" in row:
                errors[f"{path.name}: {row['label']}"] = row["prediction_error"]
    for row in json.loads((HERE.parent / "gpu_search/results/pareto.json").read_text()):
        if row["kind"] != "original":
            errors[f"gpu_search: {row['label']}"] = (
                row["predicted_request_ms"] / row["measured_request_ms"] - 1
            )
    for name, error in errors.items():
        print(f"{error:+7.1%}  {name}")
    sizes = [abs(error) for error in errors.values()]
    print(f"{len(sizes)} plans: median {statistics.median(sizes):.1%}, worst {max(sizes):.1%}")


if __name__ == "__main__":
    main()
