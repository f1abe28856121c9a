"""Builds the CPU kernels: one shared library with a plain C interface, loaded through ctypes.

kernels.cpp is compiled once for each instruction set, with that set's flags; which one runs
is chosen by the machine it runs on. No headers of Python or torch are needed. Without a
compiler the package installs all the same, and says so when it runs.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/shoal/kernels/cpu/csrc")
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


class BuildKernels(build_ext):
    """Compiles one source several times, which setuptools has no words for."""

    def build_extension(self, ext: Extension) -> None:
        objects = self.compiler.compile(
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
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-pthread", "-s"], target_lang="c++"
        )


is_x86_64 = platform.machine().lower() in ("x86_64", "amd64")
sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
headers = [str(path) for path in sorted(SOURCES.glob("*.h"))]
setup(
    ext_modules=[Extension("shoal.kernels.cpu._library", sources, depends=headers, optional=True)]
    if is_x86_64
    else [],
    cmdclass={"build_ext": BuildKernels},
)
