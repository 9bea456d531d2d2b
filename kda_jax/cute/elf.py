"""What a compiled object says of its GPU code: registers and stack, from the ELF sections that the assembler leaves."""

from __future__ import annotations

import struct
from typing import Any

MAGIC = b"\x7fELF"
CUDA = 190  # the machine that an ELF file for GPUs names
# Of a section .nv.info, attributes of a function: format, attribute, size; then the function and a value.
SIZED = 4
REGISTERS, STACK = 0x2F, 0x12


def cubins(module: bytes) -> list[bytes]:
    """The GPU's ELF files that lie in a host object."""
    starts = [i for i in range(1, len(module)) if module.startswith(MAGIC, i)]
    return [module[i:] for i in starts if struct.unpack_from("<H", module, i + 18)[0] == CUDA]


def figures(module: bytes) -> dict[str, Any]:
    """The most that a kernel in the object takes a thread."""
    return {name: max(taken(module, attribute)) for name, attribute in {"registers": REGISTERS, "stack": STACK}.items()}


def taken(module: bytes, attribute: int) -> list[int]:
    """What each kernel in the object takes a thread."""
    found: list[int] = []
    for cubin in cubins(module):
        for name, data in _sections(cubin):
            if name != ".nv.info":
                continue
            at = 0
            while at < len(data):
                kind, which, size = struct.unpack_from("<BBH", data, at)
                if (kind, which) == (SIZED, attribute):
                    found.append(struct.unpack_from("<II", data, at + 4)[1])
                at += 4 + (size if kind == SIZED else 0)
    return found


def architecture(cubin: bytes) -> int:
    """90 of sm_90a. Later versions of the format have it in the second byte of the flags."""
    (flags,) = struct.unpack_from("<I", cubin, 48)
    return (flags >> 8 if cubin[8] > 7 else flags) & 0xFF


def _sections(file: bytes) -> list[tuple[str, bytes]]:
    (offset,) = struct.unpack_from("<Q", file, 40)
    size, count, names_at = struct.unpack_from("<HHH", file, 58)
    headers = [struct.unpack_from("<IIQQQQ", file, offset + i * size) for i in range(count)]
    strings = file[headers[names_at][4] :]
    return [
        (strings[header[0] : strings.index(b"\0", header[0])].decode(), file[header[4] : header[4] + header[5]])
        for header in headers
    ]
