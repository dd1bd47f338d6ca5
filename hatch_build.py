"""Hatchling build hook: compiles the prebuilt forms of the C++ library into a wheel.

- ``pip install senet-….tar.gz``: the forms for this machine's architecture if g++ is present. Otherwise, the wheel has
  none, and the library is compiled at first use.
- ``pip install --editable .``: none; the library is compiled at first use, so that it follows the sources.
- ``SENET_WHEEL=manylinux_2_28_x86_64 python -m build --wheel``: a wheel for release (``make wheel``); every form must
  compile.
- ``SENET_WHEEL=none``: a wheel without prebuilt forms.
"""

import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Prefix of the platform tags: the code uses only symbols that glibc 2.28 has. `make wheel` installs the compilers.
GLIBC = "manylinux_2_28_"
COMPILERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}


class CompiledForms(BuildHookInterface):
    """The build hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the forms in a temporary folder, and add them to the wheel."""
        if version == "editable":
            return
        tag = os.environ.get("SENET_WHEEL", "")
        if tag == "none" or not (tag or (sys.platform == "linux" and sys.maxsize > 2**32)):
            return
        forms = self._forms()
        machine = tag.removeprefix(GLIBC) or platform.machine()
        wanted = [form for form in forms.FORMS if form.machine == machine]
        if tag and (not wanted or not tag.startswith(GLIBC)):
            known = ", ".join(GLIBC + name for name in COMPILERS)
            raise SystemExit(f"SENET_WHEEL={tag!r} is unknown; use {known}, or none")
        compiler = COMPILERS[machine] if tag else forms.compiler()
        if not wanted or compiler is None:
            return
        extra = ("-include", str(Path(self.root, "packaging", "glibc_2_28.h"))) if tag else ()
        self._folder = tempfile.TemporaryDirectory()  # kept until `finalize`
        files = {}
        try:
            for form in wanted:
                file = Path(self._folder.name, f"{form.name}.so")
                forms.compile_form(form, compiler, file, extra)
                files[str(file)] = f"senet/ops/csrc/prebuilt/{file.name}"
        except (forms.BuildError, OSError) as error:
            if tag:
                raise SystemExit(str(error)) from error
            self.app.display_warning(f"this wheel has no prebuilt kernels: {error}")
            return
        build_data["force_include"].update(files)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag or 'linux_' + machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    def _forms(self) -> Any:
        """The module that defines the forms, loaded by path because the package itself needs PyTorch."""
        file = Path(self.root, "src", "senet", "ops", "csrc", "forms.py")
        spec = importlib.util.spec_from_file_location("senet_forms", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module
        spec.loader.exec_module(module)
        return module
