"""Builds the two compiled modules by calling CMake; everything else is in pyproject.toml.

`fasternet_kernels/_C.so` is a plain shared library that `torch.ops.load_library` opens, so it
carries no Python ABI tag; `fasternet_runtime` is a pybind11 module, so a wheel fits one CPython.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_LIBRARY = "fasternet_kernels._C"
NUMPY_MODULE = "fasternet_runtime"


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


class CMakeBuild(build_ext):
    """Builds once with CMake, then copies each library to where setuptools wants it."""

    def get_ext_filename(self, fullname: str) -> str:
        """File name of an extension; the torch library has no Python ABI tag."""
        *package, module = fullname.split(".")
        if module == TORCH_LIBRARY.rpartition(".")[2]:
            return os.path.join(*package, f"{module}.so")
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        """Runs CMake, then puts its two libraries in place."""
        built = self.build_with_cmake()
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file, not new content: a process that has mapped the old library keeps it.
            target.unlink(missing_ok=True)
            self.copy_file(str(built[extension.name]), str(target))

    def build_with_cmake(self) -> dict[str, Path]:
        """Builds in a folder that is kept between calls; returns extension name -> file."""
        import pybind11
        from torch.utils import cpp_extension

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
            "-DFASTERNET_BUILD_PYTHON=ON",
            "-DFASTERNET_BUILD_TESTS=OFF",
            f"-DFASTERNET_VERSION={self.distribution.get_version()}",
            f"-DFASTERNET_TORCH_INCLUDE_DIRS={';'.join(cpp_extension.include_paths())}",
            f"-DFASTERNET_TORCH_LIBRARY_DIRS={';'.join(cpp_extension.library_paths())}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        build = [find_tool("cmake"), "--build", str(build_dir), "--parallel", str(build_jobs())]
        subprocess.run(build, check=True)
        return {
            TORCH_LIBRARY: build_dir / "_C.so",
            NUMPY_MODULE: build_dir / f"{NUMPY_MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}",
        }


setup(
    ext_modules=[Extension(TORCH_LIBRARY, sources=[]), Extension(NUMPY_MODULE, sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
