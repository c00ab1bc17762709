"""Builds zps._core. Everything else about the distribution is in pyproject.toml."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

# Contraction off: a fused multiply-add rounds once where base rounds twice, and every instruction
# set must give the same bits. The two -fno-... let sqrt and selects vectorise; neither changes a
# result.
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-g0", "-Wall", "-Wextra"]  # -g0: a tenth of the size

# Each set of kernels is one object with its own flags; the rest runs on any CPU.
TARGETS = {"csrc/kernels_base.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS["csrc/kernels_avx2.cpp"] = ["-mavx2", "-mf16c"]
    TARGETS["csrc/kernels_avx512.cpp"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"),
        "-mprefer-vector-width=512",
    ]


class BuildCore(build_ext):
    """Compiles every source with its own flags, several at a time, then links."""

    def build_extension(self, ext: Extension) -> None:
        target = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends, __file__], target):
            return

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=FLAGS + TARGETS.get(source, []),
                debug=self.debug,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(max_workers=self.parallel or None) as workers:
            for objects in workers.map(compile_one, ext.sources):
                ext.extra_objects += objects
        ext.sources = []
        self.force = True  # the base class looks at sources, of which it has none left
        super().build_extension(ext)


setup(
    # The suites of `zps bench` are beside the package here, and within it where it is installed.
    packages=[*find_packages(include=["zps*"]), "zps.bench", "zps.bench.peers"],
    package_dir={"zps.bench": "bench"},
    ext_modules=[
        Extension(
            "zps._core",
            sources=["csrc/bindings.cpp", *TARGETS, *sorted(glob("csrc/*/*.cpp"))],
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            include_dirs=["csrc", pybind11.get_include()],
            extra_link_args=["-pthread"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildCore},
)
