"""Packaging of Foursight: what it needs, and the extras for what only some people need."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="foursight",
    version="0.1.0",
    description="The GPT-4 recipe in JAX: train, align, shrink and serve; rehearsed on a laptop.",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["configs", "model*", "serve*", "tpu*", "train*"]),
    package_data={"tpu.compile": ["prices.json"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.36",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # tensorflow-datasets needs it to prepare a data set and does not say so
        "absl-py",
        "ml_collections>=1.0",
        "numpy>=2",
        "pillow",
        "tokenizers>=0.21",
        "safetensors",
        "tensorboardX",  # TensorBoard event files without TensorFlow
    ],
    extras_require={
        "data": ["ftfy", "py3langid", "sentencepiece", "pyarrow"],
        "serve": ["starlette", "uvicorn", "llguidance"],
        "tune": ["optuna>=4"],
        "eval": ["lm-eval"],
        "plot": ["matplotlib"],
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "sentencepiece",
            "pyarrow",
            "optuna>=4",
            "matplotlib",
            "scikit-learn",  # its 8 x 8 digits
            "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",  # the compiler; needs no TPU
        ],
        "peers": ["torch", "transformers", "peft"],
    },
)
