#!/usr/bin/env bash
# pandas 3.1.1: read_csv with dtype float64 for a column reads True and False as 1.0 and 0.0 where a chunk
# holds nothing else, and refuses the same words where a number stands beside them, so chunksize decides
# what is valid; and a row with one field more than the header, warned of with index_col=False, is read
# without a word once usecols is given as well.
# Seen: "[1.0, 0.0]", "ValueError: could not convert string to float: 'True'", "chunks of 2: read",
# "ParserWarning", then "with usecols: no word".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pandas==3.1.1
cd "$folder"
venv/bin/python - <<'P'
import io
import warnings
import pandas as pd

warnings.simplefilter("error")
floats = {"a": "float64"}
read = pd.read_csv(io.StringIO("a\nTrue\nFalse\n"), dtype=floats).a.tolist()
print(read)
assert read == [1.0, 0.0], read
mixed = "a\nTrue\nFalse\n2.5\n3.5\n"
try:
    pd.read_csv(io.StringIO(mixed), dtype=floats)
    raise SystemExit("True beside 2.5 is read as a number")
except ValueError as error:
    print(f"{type(error).__name__}: {error}")
parts = [part.a.tolist() for part in pd.read_csv(io.StringIO(mixed), dtype=floats, chunksize=2)]
print("chunks of 2: read")
assert parts == [[1.0, 0.0], [2.5, 3.5]], parts

text = "a,b\n1,2,3\n4,5,6\n"
try:
    told = pd.read_csv(io.StringIO(text), index_col=False)
    raise SystemExit(f"no warning without usecols: {told}")
except (pd.errors.ParserWarning, pd.errors.ParserError) as error:
    print(type(error).__name__)
quiet = pd.read_csv(io.StringIO(text), index_col=False, usecols=["a", "b"])
print("with usecols: no word,", quiet.to_dict("list"))
assert quiet.to_dict("list") == {"a": [1, 4], "b": [2, 5]}, quiet
P
