#!/usr/bin/env bash
# Pillow 13.0.0: an uncompressed TIFF of mode L with EXIF orientation 6, opened by its path, has its
# pixels scrambled; opened from bytes in memory it is right, and so is mode RGB by path.
# Seen: "L by path: wrong, from memory: right; RGB by path: right, from memory: right".
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 numpy==2.4.2
cd "$folder"
venv/bin/python - <<'P'
import io
import numpy as np
from PIL import Image

ORIENTATION = 0x0112
found = {}
for mode, shape in (("L", (4, 6)), ("RGB", (4, 6, 3))):
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(f"{mode}.tif", exif=exif)
    upright = np.rot90(pixels, -1)
    for how, source in (("path", f"{mode}.tif"), ("memory", io.BytesIO(open(f"{mode}.tif", "rb").read()))):
        with Image.open(source) as opened:
            read = np.asarray(opened)
        found[mode, how] = "right" if any(np.array_equal(read, x) for x in (pixels, upright)) else "wrong"
print(f"L by path: {found['L', 'path']}, from memory: {found['L', 'memory']}; "
      f"RGB by path: {found['RGB', 'path']}, from memory: {found['RGB', 'memory']}")
assert found == {("L", "path"): "wrong", ("L", "memory"): "right",
                 ("RGB", "path"): "right", ("RGB", "memory"): "right"}, found
P
