"""Make a virtual environment with everything that gn_det, its tools and its tests need.

Runs on the standard library alone, and on Pythons too old for gn_det, to say so. No package that
the environment already has is replaced: a PyTorch, a Detectron2 or an mmcv of your own stays as it
is, and one that is too old is told before anything changes.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)
TORCH = ["torch==2.14.1", "torchvision==0.29.1"]
# mmcv without its compiled operators: enough for the tests.
MMCV = "mmcv-lite>=2.2"
# FAIR's main of late 2024. Tagged for CPython 3.10, pure Python but for an optional extension.
DETECTRON2 = (
    "sal-detectron2==0.7.2 "
    "--hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
)
# For PyTorch's CUDA build. pip keeps its downloads in a temporary folder and in its cache, which
# may be on other disks, or not needed: only what is sure to fail is refused beforehand.
UNPACKED_GB = 7
DOWNLOAD_GB = 6
# Runs in the environment: no package of gn_det's is certain to be there.
REPAIR = """
import importlib.metadata, os, shutil, sysconfig
purelib = sysconfig.get_path("purelib")
whole = set()
for package in list(importlib.metadata.distributions(path=[purelib])):
    files = package.files or []
    missing = [file for file in files if file.hash and not os.path.exists(file.locate())]
    installer = (package.read_text("INSTALLER") or "pip").strip()
    if installer == "pip" and (missing or not files):
        print("half installed, and installed again:", package.metadata["Name"], flush=True)
        shutil.rmtree(package._path)
    else:
        whole.update(file.parts[0] for file in files)
for module in {"torch", "detectron2"}.difference(whole):
    shutil.rmtree(os.path.join(purelib, module), ignore_errors=True)
"""
# By the name that pip takes for the same, whatever the distribution writes it as.
PRESENT = """
import importlib.metadata, json, re
print(json.dumps({
    re.sub("[-_.]+", "-", package.metadata["Name"]).lower(): package.version
    for package in importlib.metadata.distributions() if package.metadata["Name"]
}))
"""
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GN_DET = ["-e", ROOT]
# What a new environment begins with may be too old for PyTorch.
NOT_HELD = ("gn-det", "pip", "setuptools", "wheel")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", nargs="?", default=".venv", help="default: %(default)s")
    venv = parser.parse_args().venv
    if sys.version_info < PYTHON:
        fail(
            "Python %d.%d is too old: gn_det needs %d.%d or newer; "
            "name one, as in `make quickstart PYTHON=python3.11`" % (sys.version_info[:2] + PYTHON)
        )
    python = os.path.join(venv, "bin", "python")
    if not os.path.exists(python):
        create(venv)
    if not has(python, "pip"):
        fail("%s is no whole environment (it has no pip); remove it and run this again" % venv)
    # There while pip is at work, and still there if it was interrupted.
    mark = os.path.join(venv, ".gn_det_installing")
    if os.path.exists(mark):
        repair(python)
    with open(mark, "w"):
        pass
    install(venv, python)
    os.remove(mark)
    print("Installed in %s" % venv)


def install(venv, python):
    """Install what is not there."""
    check_versions(venv, python)
    if not has(python, "torch"):
        check_disk(venv)
        install_beside("PyTorch", python, TORCH)
    install_beside("gn_det and what its tools and tests need", python, GN_DET + needs(python))
    if not has(python, "detectron2"):
        install_detectron2(python)


def check_versions(venv, python):
    """Refuse an environment whose Python or PyTorch is too old for gn_det."""
    version = tuple(json.loads(output(python, "import sys; print(list(sys.version_info[:2]))")))
    if version < PYTHON:
        fail(
            "%s has Python %d.%d, and gn_det needs %d.%d or newer; nothing was changed: name "
            "another environment with VENV=..." % ((venv, *version, *PYTHON))
        )
    torch = present(python).get("torch")
    if torch and tuple(map(int, re.findall(r"\d+", torch)[:2])) < OLDEST_TORCH:
        fail(
            "%s has PyTorch %s, and gn_det needs %d.%d or newer; nothing was changed: update it "
            "together with what was compiled for it (Detectron2, mmcv), or name another "
            "environment with VENV=..." % ((venv, torch, *OLDEST_TORCH))
        )


def present(python):
    """Versions of the packages in the environment, by name."""
    return json.loads(output(python, PRESENT))


def needs(python):
    """What the extras of setup.py name, but for what would be written over something else."""
    with open(os.path.join(ROOT, "setup.py")) as file:
        tree = ast.parse(file.read())
    keywords = [keyword for node in ast.walk(tree) for keyword in getattr(node, "keywords", [])]
    (extras,) = [each.value for each in keywords if each.arg == "extras_require"]
    extras = ast.literal_eval(extras)
    requirements = extras["detectron2"] + extras["dev"] + extras["mmcv"]
    if not has(python, "mmcv"):
        requirements.append(MMCV)
    if has(python, "cv2") and "opencv-python" not in present(python):
        # Another build of OpenCV; mmengine and mmcv-lite would bring theirs.
        brought = ("opencv-python", "mmengine", "mmcv-lite")
        requirements = [each for each in requirements if not each.startswith(brought)]
    return requirements


def install_beside(name, python, requirements):
    """pip install, with every package that is there held at its version."""
    held = ["%s==%s" % each for each in present(python).items() if each[0] not in NOT_HELD]
    with tempfile.TemporaryDirectory() as folder:
        constraints = os.path.join(folder, "present.txt")
        with open(constraints, "w") as file:
            file.write("\n".join(held))
        step(name, python, ["--constraint=" + constraints, *requirements])


def create(venv):
    """Create the environment, whole or not at all, in a folder that holds nothing else."""
    if os.path.exists(venv) and (not os.path.isdir(venv) or os.listdir(venv)):
        fail("%s exists and is no virtual environment; name another with VENV=..." % venv)
    command = [sys.executable, "-m", "venv", venv]
    try:
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except BaseException:
        shutil.rmtree(venv, ignore_errors=True)
        raise
    if made.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        detail = made.stdout.decode(errors="replace").strip().splitlines()
        fail(
            "no virtual environment could be made in %s (%s); on Debian and Ubuntu install "
            "python3-venv, and check that the folder can be written"
            % (venv, detail[-1] if detail else "no message")
        )


def check_disk(venv):
    free = shutil.disk_usage(venv).free / 1e9
    if free < UNPACKED_GB:
        fail(
            "%.1f GB of disk are free and PyTorch needs about %d, and up to %d more for its "
            "download; free some, or put the environment on another disk with VENV=..."
            % (free, UNPACKED_GB, DOWNLOAD_GB)
        )


def repair(python):
    """Forget the packages that an interrupted pip has left half unpacked; it unpacks them anew.

    pip says what a package has, and that it was pip, last of all. Packages of others stay.
    """
    subprocess.run([python, "-c", REPAIR], check=True)


def has(python, module):
    """Whether the environment can find a module."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec(%r) is None)" % module
    return subprocess.run([python, "-c", code]).returncode == 0


def output(python, code):
    """What a line of code prints in the environment."""
    done = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().strip()


def install_detectron2(python):
    """Install PyPI's wheel, its hash verified, beside whatever Python version this is."""
    purelib = output(python, "import sysconfig; print(sysconfig.get_path('purelib'))")
    with tempfile.TemporaryDirectory() as folder:
        requirements = os.path.join(folder, "detectron2.txt")
        with open(requirements, "w") as file:
            file.write(DETECTRON2 + "\n")
        step(
            "Detectron2",
            python,
            [
                "--no-deps",
                "--only-binary=:all:",
                "--python-version=3.10",
                "--require-hashes",
                "--target=" + purelib,
                "--requirement=" + requirements,
            ],
        )


def step(name, python, arguments):
    """pip install, with pip's own progress; one line on failure."""
    print("Installing %s" % name, flush=True)
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--retries", "2"]
    pip = subprocess.Popen(command + arguments, stderr=subprocess.PIPE)
    errors = pip.stderr.read().decode(errors="replace")
    if pip.wait() == 0:
        return
    reasons = [line for line in errors.splitlines() if line.startswith("ERROR")] or ["no message"]
    if "No space left" in errors:
        advice = "the disk is full: free about %d GB" % (UNPACKED_GB + DOWNLOAD_GB)
    elif "do not match the hashes" in errors.lower():
        advice = "the download is not the file that was checked: do not use it, try again later"
    elif "connection" in errors.lower() or "name resolution" in errors.lower():
        advice = "PyPI cannot be reached: check the network or the proxy, then run this again"
    elif "ResolutionImpossible" in errors or "conflicting dependencies" in errors:
        sys.stderr.write(errors)
        advice = (
            "a package of this environment stands against it, and none is replaced: see pip's "
            "output above, change that one yourself, or name another environment with VENV=..."
        )
    elif "No matching distribution" in errors:
        advice = "PyPI has none for Python %d.%d; try PYTHON=python3.11" % sys.version_info[:2]
    else:
        sys.stderr.write(errors)
        advice = "see pip's output above, then run this again"
    fail("%s could not be installed: %s (%s)" % (name, advice, reasons[-1][:200]))


def fail(message):
    raise SystemExit("error: " + message)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            raise
        sys.stderr.write(ended.code + "\n")
        sys.exit(2)
