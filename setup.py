"""Where the packages lie; everything else is in pyproject.toml.

`triton_kernels` is the import name of another project, and `bench` is nobody's: both folders are installed inside
`loge_kernels` and nowhere else.
"""

from setuptools import find_packages, setup

MAPPED = {"loge_kernels.triton_kernels": "triton_kernels", "loge_kernels.bench": "bench"}

packages = find_packages(include=["loge_kernels", "loge_kernels.*"])
for name, folder in MAPPED.items():
    packages += [name, *(f"{name}.{below}" for below in find_packages(folder))]

setup(
    packages=packages,
    package_dir=MAPPED,
    package_data={"loge_kernels": ["py.typed"], "loge_kernels.triton_kernels": ["configs/*.json", "resources.json"]},
)
