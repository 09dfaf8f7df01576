"""Adds the C extension to what pyproject.toml says; there is nothing else to see here."""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lbagent.core._ring",
            sources=["lbagent/core/_ring.c"],
            depends=["bpf/abi.h", *map(str, Path("lbagent/core").glob("_*.h"))],
            include_dirs=["bpf"],
            extra_compile_args=["-O3"],
        )
    ]
)
