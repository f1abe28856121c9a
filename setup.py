"""Builds the compiled parts: shared libraries with plain C interfaces, loaded through ctypes.

    shoal.kernels.cpu._library   the CPU kernels; x86-64
    shoal.comm._group            collectives over shared memory; Linux

kernels.cpp is compiled once for each instruction set, with that set's flags; which one runs
is chosen by the machine it runs on. No headers of Python or torch are needed. Without a
compiler the package installs all the same, and says so when it runs.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = "shoal.kernels.cpu._library"
GROUP = "shoal.comm._group"
SOURCES = Path("src/shoal/kernels/cpu/csrc")
GROUP_SOURCE = "src/shoal/comm/csrc/group.cpp"
GROUP_HEADER = "src/shoal/comm/csrc/stretch.h"
FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
INSTRUCTION_SETS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}


class BuildLibraries(build_ext):
    """Links no Python, and compiles one source several times: setuptools has no words for these."""

    def build_extension(self, ext: Extension) -> None:
        objects = self.compile_kernels() if ext.name == KERNELS else self.compile_group()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-pthread", "-s"], target_lang="c++"
        )

    def compile_group(self) -> list[str]:
        objects: list[str] = self.compiler.compile(
            [GROUP_SOURCE], output_dir=self.build_temp, extra_postargs=FLAGS
        )
        return objects

    def compile_kernels(self) -> list[str]:
        objects: list[str] = self.compiler.compile(
            [str(SOURCES / name) for name in ("api.cpp", "packing.cpp", "team.cpp")],
            output_dir=self.build_temp,
            extra_postargs=FLAGS,
        )
        for name, flags in INSTRUCTION_SETS.items():
            objects += self.compiler.compile(
                [str(SOURCES / "kernels.cpp")],
                output_dir=str(Path(self.build_temp) / name),
                macros=[("SHOAL_TABLE", name)],
                extra_postargs=[*FLAGS, *flags],
            )
        return objects


def libraries() -> list[Extension]:
    """What this platform can build."""
    found = []
    if platform.machine().lower() in ("x86_64", "amd64"):
        sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
        headers = [str(path) for path in sorted(SOURCES.glob("*.h"))]
        found.append(Extension(KERNELS, sources, depends=headers, optional=True))
    if sys.platform == "linux":
        found.append(Extension(GROUP, [GROUP_SOURCE], depends=[GROUP_HEADER], optional=True))
    return found


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildLibraries})
