"""Build script: shared libraries without Python or torch in them; the rest is in pyproject.toml.

``_native.so`` is the native CPU backend, built where there is a C++ compiler; ``_cuda.so`` the CUDA kernels, built
where there is nvcc. Without a compiler, or when a build fails, the package installs all the same and runs on its other
backends.
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
KERNELS = ["sweep", "importance", "threshold", "gather", "level"]
SHARED = ["entries", "parallel"]

# the same arithmetic by nvcc: no contraction, IEEE division and roots, subnormals. Machine code for A100, H100 and
# B200, of those that nvcc knows, and PTX of the last for what comes after it
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -fmad=false -prec-div=true -prec-sqrt=true -ftz=false"
CUDA_ARCHITECTURES = ("80", "90", "100")
CUDA_KERNELS = ["threshold"]

NATIVE = Extension("epi_kernels._native", [f"csrc/cpu/{name}.cpp" for name in (*KERNELS, *SHARED)], optional=True)
CUDA = Extension("epi_kernels._cuda", [f"csrc/cuda/{name}.cu" for name in CUDA_KERNELS], optional=True)


class BuildLibraries(build_ext):
    """Builds the libraries with their compilers alone."""

    def get_ext_filename(self, name: str) -> str:
        """Return the library's path: no Python version in it, ctypes loads it."""
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, extension: Extension) -> None:
        """Compile the files of a library, as many at once as there are cores, and link; say in one line if not."""
        target = Path(self.get_ext_fullpath(extension.name))
        target.unlink(missing_ok=True)  # of an earlier build
        objects = Path(self.build_temp) / extension.name
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            commands, link = _native_commands() if extension is NATIVE else _cuda_commands()
            outputs = [str(objects / f"{i}.o") for i in range(len(commands))]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(_run, [[*c, "-o", output] for c, output in zip(commands, outputs, strict=True)]))
            _run([*link, *outputs, "-ldl", "-o", str(target)])
        except (OSError, subprocess.CalledProcessError) as error:
            failed = isinstance(error, subprocess.CalledProcessError)
            reason = f"{error.cmd[0]} failed, see above" if failed else error
            lost = "native CPU backend" if extension is NATIVE else "CUDA kernels"
            print(f"epi_kernels: no {lost} ({reason}); the package works without, on its other backends")


def _native_commands() -> tuple[list[list[str]], list[str]]:
    """Return the commands that compile the CPU library, without their outputs, and the one that links it."""
    compiler = _compiler()
    jobs = [(name, "", "") for name in SHARED]
    jobs += [(name, f"-DEPI_LEVEL={level}", flags) for level, flags in LEVELS.items() for name in KERNELS]
    commands = [
        [*compiler, *FLAGS.split(), *flags.split(), *define.split(), "-c", f"csrc/cpu/{name}.cpp"]
        for name, define, flags in jobs
    ]
    return commands, [*compiler, "-shared", "-pthread"]


def _cuda_commands() -> tuple[list[list[str]], list[str]]:
    """Return the same for the CUDA library.

    Raises:
        FileNotFoundError: there is no nvcc.
    """
    home = os.environ.get("CUDA_HOME")
    # some set CUDA_HOME to a toolkit's libraries alone
    nvcc = (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError(f"no nvcc in {f'{home}/bin and ' if home else ''}PATH")
    flags = [*CUDA_FLAGS.split(), *_code_of(nvcc)]
    commands = [[nvcc, *flags, "-c", f"csrc/cuda/{name}.cu"] for name in CUDA_KERNELS]
    # the runtime is linked in: the library needs a driver and nothing else
    return commands, [nvcc, "-shared", "-cudart", "static"]


def _code_of(nvcc: str) -> list[str]:
    """Return the options for CUDA_ARCHITECTURES: nvcc refuses the whole file for one that it does not know.

    Raises:
        FileNotFoundError: it knows none of them.
        CalledProcessError: it does not say which it knows.
    """
    run = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = [name for name in CUDA_ARCHITECTURES if f"compute_{name}" in run.stdout.split()]
    if not known:
        raise FileNotFoundError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHITECTURES)}")
    codes = [f"sm_{name}" for name in known[:-1]] + [f"[sm_{known[-1]},compute_{known[-1]}]"]
    pairs = zip(known, codes, strict=True)
    return [word for name, code in pairs for word in ("-gencode", f"arch=compute_{name},code={code}")]


class PlatformWheel(bdist_wheel):
    """Tags the wheel with the platform and with no Python version: the library knows none."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return py3-none-<platform>, or py3-none-any where no library was built.

        pip keeps a wheel that it has built, and of two takes that of the platform: one without a library must not pass
        for one with it.
        """
        built = Path(self.get_finalized_command("build_ext").build_lib, "epi_kernels").glob("*.so")
        return ("py3", "none", super().get_tag()[2] if any(built) else "any")


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


setup(ext_modules=[NATIVE, CUDA], cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
