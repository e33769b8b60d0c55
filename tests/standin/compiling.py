"Compile the extension of the stand-in, once, into the user's cache."

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("standin.cpp")
LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")


def missing():
    "Say why the stand-in cannot be built here; None where it can be."
    pins = (SOURCE.parents[2] / "constraints.txt").read_text().splitlines()
    pinned = next(pin.split("==")[1] for pin in pins if pin.startswith("torch=="))
    if torch.__version__.split("+")[0] != pinned:
        return f"torch is {torch.__version__}, the stand-in is written for {pinned}"
    if compiler() is None:
        return "there is no C++ compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there are no headers of Python"
    return None


def compiler():
    "Find a C++ compiler; None if there is none."
    return shutil.which(os.environ.get("CXX", "c++"))


def compiled():
    "Compile the extension, unless that has been done; its path."
    from torch.utils import cpp_extension  # needs setuptools

    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    command = [compiler(), "-std=c++20", "-O1", "-w", "-fPIC", "-shared", str(SOURCE)]
    command += ["-DTORCH_EXTENSION_NAME=standin_extension"]
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    command += [f"-isystem{folder}" for folder in folders]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()]
    command += [f"-l{library}" for library in LIBRARIES]
    made_of = [SOURCE.read_text(), torch.__version__, sys.version, *command]
    name = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    path = caches / "grpo_nb" / f"standin-{name}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.replace(path)
    return path
