"""The hash of the tensors in a safetensors file, as a recipe has it; read without torch, which this room lacks."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from advkd.cache.files.strict_json import integer, parse_json

_DTYPES = {
    "F64": ("torch.float64", 8),
    "F32": ("torch.float32", 4),
    "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2),
    "I64": ("torch.int64", 8),
    "I32": ("torch.int32", 4),
    "I16": ("torch.int16", 2),
    "I8": ("torch.int8", 1),
    "U8": ("torch.uint8", 1),
    "BOOL": ("torch.bool", 1),
}
"""Name in the file → name in the hash, bytes of a value."""
_MAX_HEADER = 16 << 20


def tensors_sha256_of_file(data: bytes) -> str:
    """Hash of a safetensors file's tensors by sorted name, dtype, shape and bytes, whatever their order in the file.

    Raises:
        ValueError: it is no such file.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header_bytes > min(_MAX_HEADER, len(data) - 8):
        raise ValueError("it is no safetensors file")
    header: Any = parse_json(data[8 : 8 + header_bytes])
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    body, total = memoryview(data)[8 + header_bytes :], hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        try:
            dtype, size = _DTYPES[header[name]["dtype"]]
            shape = [integer(length) for length in header[name]["shape"]]
            start, stop = (integer(offset) for offset in header[name]["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise ValueError("its header describes a tensor wrongly") from None
        if not 0 <= start <= stop <= len(body) or stop - start != size * math.prod(shape):
            raise ValueError("a tensor's bytes are outside the file, or not as many as its shape has")
        total.update(f"{name} {dtype} {shape}\n".encode())
        total.update(body[start:stop])
    return total.hexdigest()
