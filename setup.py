"""Build script: the Python packages, and the native library where a compiler is found."""

from setuptools import setup

setup(
    packages=["dgs_kernels", "dgs_kernels.ops", "dgs_kernels.triton", "dgsnet"],
    package_dir={"dgs_kernels": "dgs_kernels", "dgsnet": "python/dgsnet"},
)
