"""The compiled loops that a wheel for Linux on x86-64 brings, and the one of them for a processor.

kernels/setup.py builds them by this table, and runs this file without torch.
"""

import hashlib
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
AVX2 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
KINDS = {
    "avx512_bf16": (("-march=x86-64-v4", "-mavx512bf16"), (*AVX512, "avx512_bf16")),
    "avx512": (("-march=x86-64-v4",), AVX512),
    "avx2": (("-march=x86-64-v3",), AVX2),
}
"""Name -> what the compiler is told, and what a processor must have, as /proc/cpuinfo calls it; the best one first.

AMX is a part of the first one and asked for when it runs.
"""

DIGITS = 24  # of a digest in a file's name


def sources(source: Path) -> str:
    """Return the text of the loop and of the headers beside it."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h"))))


def path_of(kind: str, source: Path) -> Path:
    """Return where the library of a kind lies, beside its source, of which its name holds a digest."""
    digest = hashlib.sha256(sources(source).encode()).hexdigest()[:DIGITS]
    return source.parent / "shipped" / f"fused-{kind}-{digest}.so"


def shipped_library(source: Path, processor: str) -> Path | None:
    """Return the best library for a processor, by the lines of /proc/cpuinfo; None if none is of this source."""
    features = {word for line in processor.splitlines() if line.startswith("flags") for word in line.split()}
    fitting = (path_of(kind, source) for kind, (_, needed) in KINDS.items() if features.issuperset(needed))
    return next((path for path in fitting if path.is_file()), None)
