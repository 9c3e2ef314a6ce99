"""Builds the two compiled modules by calling CMake; everything else is in pyproject.toml.

`fasternet_kernels/_C.so` is a plain shared library that `torch.ops.load_library` opens, so it
carries no Python ABI tag; `fasternet_runtime` is a pybind11 module, so a wheel fits one CPython.
Without Python's headers only the first is built.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
TORCH_LIBRARY = "fasternet_kernels._C"
NUMPY_MODULE = "fasternet_runtime"


def require_torch() -> None:
    """Ends the build unless the torch that it will serve can be imported."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"fasternet_kernels cannot be built: {error}. Install torch first, then build with "
            "--no-build-isolation: the build uses the torch that is installed."
        ) from error
    release = torch.__version__.split("+")[0]
    if tuple(int(part) for part in release.split(".")[:2]) < (2, 10):
        raise SystemExit(f"fasternet_kernels needs torch 2.10 or newer, found {release}")


def has_python_headers() -> bool:
    """Whether this Python can compile extension modules; some systems package that separately."""
    folders = (sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    return any((Path(folder) / "Python.h").is_file() for folder in folders)


def find_tool(name: str) -> str:
    """Path of a build tool: the one installed beside this Python, else the one on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"building fasternet_kernels needs {name}: pip install {name}")
    return found


def build_jobs() -> int:
    """Compiler processes to run at once: CMAKE_BUILD_PARALLEL_LEVEL, else the usable processors."""
    if jobs := os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL"):
        return int(jobs)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class DistInfo(dist_info):
    """Metadata comes before everything else that pip does: the place to refuse before anything is
    downloaded for a build that could only fail.
    """

    def run(self) -> None:
        """Writes the metadata of a package that can be built here."""
        require_torch()
        super().run()


class CMakeBuild(build_ext):
    """Builds once with CMake, then copies each library to where setuptools wants it."""

    def get_ext_filename(self, fullname: str) -> str:
        """File name of an extension; the torch library has no Python ABI tag."""
        *package, module = fullname.split(".")
        if module == TORCH_LIBRARY.rpartition(".")[2]:
            return os.path.join(*package, f"{module}.so")
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        """Runs CMake, then puts its libraries in place."""
        require_torch()
        built = self.build_with_cmake()
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file, not new content: a process that has mapped the old library keeps it.
            target.unlink(missing_ok=True)
            self.copy_file(str(built[extension.name]), str(target))

    def build_with_cmake(self) -> dict[str, Path]:
        """Builds in a folder that is kept between calls; returns extension name -> file."""
        from torch.utils import cpp_extension

        with_python = any(extension.name == NUMPY_MODULE for extension in self.extensions)
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build_dir = ROOT / "build" / tag
        configure = [
            find_tool("cmake"),
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            "-DFASTERNET_BUILD_TORCH=ON",
            f"-DFASTERNET_BUILD_PYTHON={'ON' if with_python else 'OFF'}",
            "-DFASTERNET_BUILD_TESTS=OFF",
            f"-DFASTERNET_VERSION={self.distribution.get_version()}",
            f"-DFASTERNET_TORCH_INCLUDE_DIRS={';'.join(cpp_extension.include_paths())}",
            f"-DFASTERNET_TORCH_LIBRARY_DIRS={';'.join(cpp_extension.library_paths())}",
        ]
        if with_python:
            import pybind11

            configure.append(f"-DPython_EXECUTABLE={sys.executable}")
            configure.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        subprocess.run(configure, check=True)
        build = [find_tool("cmake"), "--build", str(build_dir), "--parallel", str(build_jobs())]
        subprocess.run(build, check=True)
        return {
            TORCH_LIBRARY: build_dir / "_C.so",
            NUMPY_MODULE: build_dir / f"{NUMPY_MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}",
        }


modules = [TORCH_LIBRARY]
if has_python_headers():
    modules.append(NUMPY_MODULE)
else:
    warnings.warn(
        f"{NUMPY_MODULE} is left out: this Python has no headers, there is no Python.h in "
        f"{sysconfig.get_path('include')}. fasternet_kernels itself does not need them.",
        stacklevel=1,
    )
setup(
    ext_modules=[Extension(name, sources=[]) for name in modules],
    cmdclass={"build_ext": CMakeBuild, "dist_info": DistInfo},
)
