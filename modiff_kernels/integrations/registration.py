"""Makes diffusers know the quantization method "modiff", without importing it: as soon as diffusers is imported.

diffusers has no entry point for quantization methods; two dicts in `diffusers.quantizers.auto` are what there is. This
module needs the standard library alone, because `import modiff_kernels` runs it."""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLES = "diffusers.quantizers.auto"
QUANTIZER = "modiff_kernels.integrations.quantizer"  # registers itself in them


def register_with_diffusers() -> None:
    """Register at once where diffusers has its tables of methods already, else right after they are imported."""
    if sys.modules.get(TABLES) is not None:
        importlib.import_module(QUANTIZER)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds `TABLES` as Python would, and registers after it has run. Good for one import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            importlib.import_module(QUANTIZER)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
