"""Adds the C extension to what pyproject.toml says; there is nothing else to see here."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "lbagent.core._ring",
            sources=["lbagent/core/_ring.c"],
            depends=["bpf/abi.h"],
            include_dirs=["bpf"],
            extra_compile_args=["-O3"],
        )
    ]
)
