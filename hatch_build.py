"""Compiles the prebuilt forms of the C++ library into a wheel (Hatchling's build hook).

- ``pip install senet-….tar.gz``: the forms for this machine's architecture, where g++ is; else a wheel without any, and
  the library is compiled at its first use.
- ``pip install --editable .``: none; what is compiled at the first use follows the sources.
- ``SENET_WHEEL=manylinux_2_28_x86_64 python -m build --wheel``: a wheel for others (``make wheel``); no form may fail.
- ``SENET_WHEEL=none``: a wheel without any.
"""

import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Symbols of the C library that glibc 2.28 has too. The compilers are those of `make wheel`.
GLIBC = "manylinux_2_28_"
COMPILERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}


class CompiledForms(BuildHookInterface):
    """See above."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the forms to a temporary folder and put them into the wheel."""
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
            raise SystemExit(f"SENET_WHEEL={tag!r} is none of {known}, none")
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
            self.app.display_warning(f"no compiled code in this wheel: {error}")
            return
        build_data["force_include"].update(files)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag or 'linux_' + machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()

    def _forms(self) -> Any:
        """The module that says which forms there are; PyTorch, which the package imports, need not be here."""
        file = Path(self.root, "src", "senet", "ops", "csrc", "forms.py")
        spec = importlib.util.spec_from_file_location("senet_forms", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
