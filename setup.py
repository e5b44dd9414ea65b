"""Build script: the native backend, a shared library without Python or torch in it; the rest is in pyproject.toml.

Without a compiler, or when the build fails, the package installs all the same and runs on its other backends.
"""

import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# no contraction: masks are compared bit for bit. No errno and no traps: else the masked loops stay scalar
FLAGS = "-std=c++17 -O3 -fPIC -pthread -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"

# SIMD level -> its flags; the library chooses at run time
LEVELS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4"}

# compiled once for each level; csrc/cpu/kernels.h says why these alone
KERNELS = ["masked_adamw", "importance", "threshold", "sparse_adamw", "level"]
SHARED = ["entries", "parallel"]

NATIVE = Extension("epi_kernels._native", [f"csrc/cpu/{name}.cpp" for name in (*KERNELS, *SHARED)], optional=True)


class BuildNative(build_ext):
    """Builds the library with the C++ compiler alone."""

    def get_ext_filename(self, name: str) -> str:
        """Return the library's path: no Python version in it, ctypes loads it."""
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, extension: Extension) -> None:
        """Compile every file for its levels, at once, and link them; say in one line if that cannot be done."""
        target = Path(self.get_ext_fullpath(extension.name))
        target.unlink(missing_ok=True)  # of an earlier build
        try:
            self._build(target)
        except (OSError, subprocess.CalledProcessError) as error:
            failed = isinstance(error, subprocess.CalledProcessError)
            reason = f"{error.cmd[0]} failed, see above" if failed else error
            print(f"epi_kernels: no native CPU backend ({reason}); the package works without it, slower on a CPU")

    def _build(self, target: Path) -> None:
        compiler = _compiler()
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = [(name, "", "") for name in SHARED]
        jobs += [(name, f"-DEPI_LEVEL={level}", flags) for level, flags in LEVELS.items() for name in KERNELS]
        commands = [
            [*compiler, *FLAGS.split(), *flags.split(), *define.split(), "-c", f"csrc/cpu/{name}.cpp"]
            for name, define, flags in jobs
        ]
        outputs = [str(objects / f"{i}.o") for i in range(len(jobs))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, [[*command, "-o", output] for command, output in zip(commands, outputs, strict=True)]))
        _run([*compiler, "-shared", "-pthread", *outputs, "-ldl", "-o", str(target)])


class PlatformWheel(bdist_wheel):
    """Tags the wheel with the platform and with no Python version: the library knows none."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return py3-none-<platform>."""
        return ("py3", "none", super().get_tag()[2])


def _compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, else the first there is.

    Raises:
        FileNotFoundError: there is none.
    """
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("no C++ compiler found; set CXX")


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)


setup(ext_modules=[NATIVE], cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
