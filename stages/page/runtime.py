"""onnxruntime-web, which runs the student in the browser: from a CDN, pinned by hashes, or copied beside the page."""

from __future__ import annotations

import base64
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from advkd.cache.errors import UsageError

VERSION = "1.30.0"
CDN = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"
FOLDER = "runtime"


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """A module and its WebAssembly, by address and by integrity as in HTML (`sha384-…`)."""

    module: str
    wasm: str
    module_integrity: str
    wasm_integrity: str

    @property
    def sources(self) -> tuple[str, str]:
        """Addresses of module and WebAssembly for a Content-Security-Policy; empty for those beside the page."""
        module, wasm = (address if address.startswith("https:") else "" for address in (self.module, self.wasm))
        return module, wasm

    @classmethod
    def of(cls, webgpu: bool) -> Self:
        """The pinned release on its CDN.

        Args:
            webgpu: whether it can use a GPU; without it is half as large.
        """
        module, wasm = _NAMES[webgpu]
        module_integrity, wasm_integrity = _HASHES[webgpu]
        return cls(
            module=CDN + module, wasm=CDN + wasm, module_integrity=module_integrity, wasm_integrity=wasm_integrity
        )

    @classmethod
    def copied(cls, source: Path, webgpu: bool, site: Path) -> Self:
        """Copy an unpacked onnxruntime-web of any version beside the page.

        Args:
            source: the package's folder, or its folder `dist`.
            webgpu: as above.
            site: the page's folder.

        Raises:
            UsageError: the files aren't there.
        """
        dist = source / "dist" if (source / "dist").is_dir() else source
        missing = [name for name in _NAMES[webgpu] if not (dist / name).is_file()]
        if missing:
            raise UsageError(
                f"--runtime {source}: no {missing[0]}; expected an unpacked npm package onnxruntime-web, such as "
                "`npm install onnxruntime-web` leaves in node_modules/onnxruntime-web"
            )
        (site / FOLDER).mkdir(parents=True, exist_ok=True)
        for name in _NAMES[webgpu]:
            shutil.copyfile(dist / name, site / FOLDER / name)
        module, wasm = _NAMES[webgpu]
        module_integrity, wasm_integrity = (_integrity(site / FOLDER / name) for name in (module, wasm))
        return cls(
            module=f"./{FOLDER}/{module}",
            wasm=f"./{FOLDER}/{wasm}",
            module_integrity=module_integrity,
            wasm_integrity=wasm_integrity,
        )


_NAMES = {
    False: ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    True: ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
_HASHES = {
    False: (
        "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
        "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
    ),
    True: (
        "sha384-1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f",
        "sha384-EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
    ),
}
"""Of `VERSION`, as the npm registry has it."""


def integrity(data: bytes) -> str:
    """SHA-384 as HTML's `integrity` and a Content-Security-Policy write it."""
    return f"sha384-{base64.b64encode(hashlib.sha384(data).digest()).decode()}"


def _integrity(path: Path) -> str:
    return integrity(path.read_bytes())
