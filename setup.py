"""What pyproject.toml cannot say: the packages found, and two folders of the repository as folders of `pipeline`."""

from setuptools import find_packages, setup

SHIPPED = ("configs", "ds_configs")

setup(
    packages=[
        *find_packages(include=("pipeline", "pipeline.*", "eval", "eval.*", "launch")),
        *(f"pipeline.shipped.{name}" for name in SHIPPED),
    ],
    package_dir={f"pipeline.shipped.{name}": name for name in SHIPPED},
)
