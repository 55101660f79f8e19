"""A safetensors file, written where it is said: the library's own writer makes a file of another name and renames it.

A writer that is killed would leave that one for ever, and nobody could hold a lock on it. Tensors go to the disk one
after another, so that one that is on an accelerator is on the host alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.int64: "I64",
}
_ALIGNED = 8


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Writes tensors as safetensors does.

    Args:
        path: The file; what was there is overwritten as it is written (`pipeline.files.replacing`).
        tensors: By their names in the file.
        metadata: What the file says of itself.

    Raises:
        OSError: It cannot be written.
    """
    # The widest first: then each begins at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape, dtype = list(tensors[name].shape), _NAMES[tensors[name].dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].detach().cpu().flatten().view(torch.uint8).numpy().data)
