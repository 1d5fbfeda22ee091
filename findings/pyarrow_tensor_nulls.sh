#!/usr/bin/env bash
# pyarrow 25.0.1: FixedShapeTensorArray.to_numpy_ndarray gives 0 for a null inside a tensor and zeros for
# a tensor that is null, where to_pylist shows both; it neither raises nor has an argument for it.
# Seen: "to_pylist [[1.0, None], None], to_numpy_ndarray [[1.0, 0.0], [0.0, 0.0]]".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyarrow==25.0.1 numpy==2.4.2
cd "$folder"
venv/bin/python - <<'P'
import pyarrow as pa

kind = pa.fixed_shape_tensor(pa.float32(), (2,))
storage = pa.array([[1.0, None], None], type=kind.storage_type)
tensors = pa.ExtensionArray.from_storage(kind, storage)
listed, read = tensors.storage.to_pylist(), tensors.to_numpy_ndarray().tolist()
print(f"to_pylist {listed}, to_numpy_ndarray {read}")
assert listed == [[1.0, None], None], listed
assert read[0] == [1.0, 0.0], read
assert len(read) == 2 and all(value == value for value in read[1]), read
P
