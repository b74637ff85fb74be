"""Build of the one extension: the Cython boundary plus every C file of src_c/. Everything else stands in pyproject.toml."""

import os
from glob import glob

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

# FASTBN_CFLAGS adds flags for a sanitizer or a debug build; no -march: one build runs on every CPU of its family.
# No product may merge with a sum into one rounding: that is what makes the same bits everywhere.
flags = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# The generated file leaves slots of Python's type structures out, which -Wextra would report line by line.
flags += ["-Wall", "-Wextra", "-Wno-missing-field-initializers"]
extra = os.environ.get("FASTBN_CFLAGS", "").split()

extension = Extension(
    "fastbn._native",
    sources=["fastbn/_native.pyx", *sorted(glob("src_c/*.c"))],
    depends=sorted(glob("src_c/*.h") + glob("src_c/*.inc")),
    include_dirs=["src_c", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")],
    extra_compile_args=flags + extra,
    extra_link_args=extra,
)

setup(ext_modules=cythonize([extension], language_level=3))
