#!/usr/bin/env bash
# MLflow 3.17.2: JSON true in `inputs` becomes 1.0 for a tensor signature of float32, while a text is refused:
# a client that sends a mask instead of an image gets an answer and no word.
# Seen: "true -> [[1.0, 0.0]]", "text -> MlflowException".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mlflow-skinny==3.17.2 numpy==2.4.2 pandas==2.3.3 fastapi uvicorn flask
cd "$folder"
venv/bin/python - <<'P'
import json
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from mlflow.types import Schema, TensorSpec

schema = Schema([TensorSpec(np.dtype("float32"), (-1, 2))])
read = infer_and_parse_data({"inputs": json.loads("[[true, false]]")}, schema)
print("true ->", read.tolist(), read.dtype)
assert read.tolist() == [[1.0, 0.0]] and read.dtype == np.float32
try:
    infer_and_parse_data({"inputs": [["yes", "no"]]}, schema)
    raise SystemExit("a text is read as a number")
except MlflowException as error:
    print("text ->", type(error).__name__)
P
