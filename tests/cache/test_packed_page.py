"""A reader of packed stores made from docs/cache-format.md alone: slow, sharing nothing with the package but PCodec."""

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from numcodecs.pcodec import PCodec

from advkd.cache import TrajectoryCache
from advkd.cache.format.encoding import Packing
from advkd.cache.write.pack import pack
from tests.cache.packs import FIRST_GOLDEN, GOLDEN, write_smooth
from tests.conftest import ROOT

PAGE = (ROOT / "docs/cache-format.md").read_text()
F = np.float32
Values = npt.NDArray[np.float32]
PHASES = [(0, 0, 4), (2, 2, 4), (0, 2, 4), (2, 0, 4), (1, 1, 2), (0, 1, 2), (1, 0, 2)]


def at_edge(x: Values, y: int, column: int) -> Values:
    return x[min(max(y, 0), x.shape[0] - 1), min(max(column, 0), x.shape[1] - 1)]


def blur(x: Values) -> Values:
    height, width = x.shape[:2]
    d, m = np.empty_like(x), np.empty_like(x)
    for y in range(height):
        for i in range(width):
            d[y, i] = ((x[y, i] + x[y, i]) + at_edge(x, y - 1, i)) + at_edge(x, y + 1, i)
    for y in range(height):
        for i in range(width):
            m[y, i] = ((d[y, i] + d[y, i]) + at_edge(d, y, i - 1)) + at_edge(d, y, i + 1)
    return m * F(1 / 16)


def neighbours(y: int, x: int, stride: int) -> list[list[tuple[int, int]]]:
    h = stride // 2
    if (y, x) == (0, 0):
        return []
    if y == x == h:
        return [[(-h, -h), (-h, h), (h, -h), (h, h)]]
    return [[(0, -h), (0, h)], [(-h, 0), (h, 0)]]


def step_of(max_error: float, dtype: str = "float16") -> np.float32:
    bounds = [max_error]
    for power in range(-24, -6) if dtype == "float16" else range(-40, -19):
        u = 2.0**power
        if u <= 2 * max_error:
            bounds.append((max_error // u + 0.5) * u)
    return F(2 * (1 - 2**-9) * min(bounds))


def places_after(q: int, p: np.float32) -> np.float32:
    """q numbers of float16 after p."""
    bits = int(np.float16(p).view(np.uint16))
    place = (bits if bits < 0x8000 else -1 - (bits - 0x8000)) + q
    return F(np.uint16(place if place >= 0 else 0x8000 + (-1 - place)).view(np.float16))


def decode(data: bytes, known: list[list[Values]], shape: tuple[int, ...], packing: dict[str, float]) -> list[Values]:
    """A state by group of seeds, each (C, H, W, seeds); `known` by state and group."""
    channels, height, width = shape
    magic, num_weights, num_streams = struct.unpack("<4sII", data[:12])
    assert magic == b"akc1"
    weights = np.frombuffer(data, "<f4", num_weights, 12).tolist()
    lengths = np.frombuffer(data, "<u4", num_streams, 12 + 4 * num_weights).tolist()
    start = 12 + 4 * num_weights + 4 * num_streams
    streams = []
    for length in lengths:
        streams.append(PCodec().decode(data[start : start + length]))
        start += length
    assert start == len(data)
    groups, used = [], [0] * num_streams
    per_channel = 3 * len(known) + 1
    for group in range(len(known[0])):
        states = [state[group] for state in known]
        P, R, found = (np.zeros_like(states[0]) for _ in range(3))
        for c in range(channels):
            a = weights[c * per_channel : (c + 1) * per_channel]
            total = np.zeros_like(states[0][c])
            for i in (2, 1, 0):
                total = blur(total) if i < 2 else total
                for v, state in enumerate(states):
                    total = total + F(a[3 * v + i]) * state[c]
            P[c] = total + F(a[-1])
        at, stream = channels * per_channel, 0
        for y0, x0, stride in PHASES:
            rows, columns = range(y0, height, stride), range(x0, width, stride)
            if not rows or not columns:
                continue
            errors: list[Values] = []
            for c in range(channels):
                offsets = neighbours(y0, x0, stride)
                s, e = weights[at : at + len(offsets)], weights[at + len(offsets) : at + len(offsets) + c]
                at += len(offsets) + c
                left = np.zeros_like(P[c])
                for y in rows:
                    for x in columns:
                        p = P[c, y, x].copy()
                        for weight, group_of in zip(s, offsets, strict=True):
                            total = np.zeros_like(p)
                            for dy, dx in group_of:
                                if 0 <= y + dy < height and 0 <= x + dx < width:
                                    total = total + R[c, y + dy, x + dx]
                            p = p + F(weight) * total
                        for weight, error in zip(e, errors, strict=True):
                            p = p + F(weight) * error[y, x]
                        q = streams[stream][used[stream] : used[stream] + p.size]
                        used[stream] += p.size
                        if "max_error" in packing:
                            found[c, y, x] = q.astype(F) * step_of(packing["max_error"]) + p
                        else:
                            found[c, y, x] = [places_after(int(n), v) for n, v in zip(q, p, strict=True)]
                        left[y, x] = found[c, y, x] - p
                        R[c, y, x] = found[c, y, x] - P[c, y, x]
                errors.append(left)
                stream += 1
        groups.append(found)
    return groups


def check(store: Path) -> int:
    """Decode a whole store, and compare each chunk with the hash in the ledger; how many there were."""
    root = json.loads((store / "zarr.json").read_bytes())["attributes"]["advkd"]
    shape, layout = tuple(root["recipe"]["item_shape"]), root["layout"]
    size, count = layout["block_size"], 0
    in_group = max(32, min(512, 2**18 // int(np.prod(shape))))
    for path in sorted((store / "blocks").iterdir()):
        record, block = json.loads(path.read_bytes()), int(path.stem)
        # The noise rule has a reader from the page of its own, in test_format.py.
        x_t = TrajectoryCache.open(store).packed.states(block, {0})  # type: ignore[union-attr]
        raw = next(iter(x_t))[1]
        values = np.frombuffer(raw[:-4], "<f2").reshape(size, *shape)
        first = [values[i : i + in_group].astype(F).transpose(1, 2, 3, 0) for i in range(0, size, in_group)]
        known = [first]
        for state in layout["states"][1:]:
            name = f"states/{state['step']:04d}"
            data = (store / name / "c" / str(block) / "0/0/0").read_bytes()
            assert hashlib.sha256(data).hexdigest() == record["arrays"][name]["sha256"]
            groups = decode(data[:-4], [first, *known[1:][-2:]], shape, layout["packing"])
            known.append(groups)
            stored = np.concatenate([group.transpose(3, 0, 1, 2) for group in groups]).astype("<f2").tobytes()
            assert hashlib.sha256(stored + crc(stored)).hexdigest() == record["arrays"][name]["raw"]["sha256"]
            count += 1
    return count


def crc(data: bytes) -> bytes:
    """CRC-32C, bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return (value ^ 0xFFFFFFFF).to_bytes(4, "little")


def test_the_pages_vectors_hold() -> None:
    """The page's reader agrees with the ledger's hashes below, so these are what it decodes."""
    (vectors,) = re.findall(r"```text packed vectors\n(.*?)```", PAGE, re.S)
    for line in vectors.splitlines():
        match line.split():
            case [max_error, dtype, bits]:
                assert f"{int(step_of(float(max_error), dtype).view(np.uint32)):08x}" == bits
            case [store, state, block, digest]:
                record = json.loads((ROOT / f"tests/data/{store}/blocks/{int(block):06d}.json").read_bytes())
                assert record["arrays"][f"states/{state}"]["raw"]["sha256"][:16] == digest
            case _:
                raise AssertionError(line)


@pytest.mark.parametrize("golden", [FIRST_GOLDEN, GOLDEN])
def test_the_golden_stores(golden: Path) -> None:
    assert check(golden) == 4


@pytest.mark.parametrize(
    "packing", [Packing.of("lossless", "float16"), Packing.of("archive", "float16", max_error=0.03)]
)
def test_stores_of_several_groups(tmp_path: Path, packing: Packing) -> None:
    """Of four states, so that one falls out of what is known."""
    write_smooth(tmp_path / "store.zarr", (3, 5, 6), "float16", block_size=520, num_blocks=1, num_states=5)
    pack(TrajectoryCache.open(tmp_path / "store.zarr"), tmp_path / "packed.zarr", packing)
    assert check(tmp_path / "packed.zarr") == 4
