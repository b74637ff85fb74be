"""Build of the one extension: the Cython boundary plus every C file of src_c/. Everything else stands in pyproject.toml."""

import os
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError


class BuildExt(build_ext):
    """build_ext that compiles the files of an extension side by side: each instruction set takes its quarter of a minute."""

    def build_extensions(self):
        compile_in_turn = self.compiler.compile

        def compile_side_by_side(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_side_by_side
        try:
            super().build_extensions()
        except CCompilerError:
            raise SystemExit(f"fastbn: Cannot build: {self.obstacle()}") from None

    def obstacle(self):
        """Say in one line, the last of what may be a long output, why the compiler failed."""
        compiler = self.compiler.compiler_so[0]
        if shutil.which(compiler) is None:
            return f"the C compiler {compiler!r} is not installed, install gcc or clang or name another one in CC"
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            return "the headers of this Python are not installed, install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)"
        return f"the C compiler {compiler!r} failed, its messages stand above"


# FASTBN_CFLAGS adds flags, as -DFASTBN_DEBUG and those of a sanitizer; no -march: one build runs on every CPU of its family.
# No product may merge with a sum into one rounding: that is what makes the same bits everywhere.
flags = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Some interpreters ask for debug information, which would make the file twelve times as large and the build twice as slow.
flags += ["-g0"]
# The generated file leaves slots of Python's type structures out, which -Wextra would report line by line.
flags += ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]
extra = os.environ.get("FASTBN_CFLAGS", "").split()

extension = Extension(
    "fastbn._native",
    sources=["fastbn/_native.pyx", *sorted(glob("src_c/*.c"))],
    depends=sorted(glob("src_c/*.h") + glob("src_c/*.inc") + glob("fastbn/*.pxi")),
    include_dirs=["src_c", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")],
    extra_compile_args=flags + extra,
    # Names of local functions are of use to nobody but a debugger, whose build has flags of its own.
    extra_link_args=extra or (["-Wl,-s"] if sys.platform == "linux" else []),
)

setup(ext_modules=cythonize([extension], language_level=3), cmdclass={"build_ext": BuildExt})
