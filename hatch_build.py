"""Build hook: refuses a checkout whose links are gone, so that no wheel or sdist is ever made without its kernels."""

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Links(BuildHookInterface[Any]):
    """Runs before every wheel, editable install and sdist."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Raise ImportError with the mend where flash/kernels or flash/autotune is not a folder."""
        package = Path(self.root) / "flash"
        runpy.run_path(str(package / "_checkout.py"))["require_links"](package)
