"""Build what pyproject.toml describes; with DIT_ACCEL_SHIP_LOOP=1 a wheel for Linux on x86-64 that holds the loop."""

import os
import re
import runpy
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

FOLDER = Path("dit_accel_kernels/backends/torch")
ALONE = ("-static-libstdc++", "-ffunction-sections", "-Wl,--exclude-libs,ALL,--gc-sections", "-s")
"""No more of a system's libraries is asked for than the loop needs."""


class WithLoop(build_py):
    """Compiles the loop for each kind of processor."""

    def run(self):
        """Copy the package, and add the libraries."""
        super().run()
        shipped, source = runpy.run_path(str(FOLDER / "shipped.py")), Path(self.build_lib) / FOLDER / "fused.cpp"
        for kind, (flags, _) in shipped["KINDS"].items():
            library = shipped["path_of"](kind, source)
            library.parent.mkdir(exist_ok=True)
            command = [os.environ.get("CXX", "c++"), *shipped["FLAGS"], *flags, *ALONE, str(source), "-o", str(library)]
            subprocess.run(command, check=True)


class ForLinux(bdist_wheel):
    """Names the oldest glibc that has what the loop asks for."""

    def get_tag(self):
        """Return what the libraries need: any Python 3, no ABI of it, and a glibc."""
        libraries = (Path(self.get_finalized_command("build").build_lib) / FOLDER / "shipped").glob("*.so")
        minors = [int(minor) for path in libraries for minor in re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())]
        return "py3", "none", f"manylinux_2_{max(minors)}_x86_64"


class Compiled(Distribution):
    """Holds something that was compiled, though no extension module."""

    def has_ext_modules(self):
        """Have the wheel say so."""
        return True


if os.environ.get("DIT_ACCEL_SHIP_LOOP") == "1":
    setup(distclass=Compiled, cmdclass={"build_py": WithLoop, "bdist_wheel": ForLinux})
else:
    setup()
