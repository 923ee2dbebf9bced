"""Packages and their folders; everything else about the project stands in pyproject.toml.

`triton_kernels/` is installed as `hfac.triton_kernels` and never under its own name, which belongs to another project.
"""

from setuptools import setup

setup(
    packages=["hfac", "hfac.backends", "hfac.cli", "hfac.optim", "hfac.triton_kernels"],
    package_dir={"hfac": "hfac", "hfac.triton_kernels": "triton_kernels"},
    package_data={"hfac": ["py.typed"]},
)
