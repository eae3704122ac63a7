"""Where the policies that ship with the product are, installed or in a source checkout."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGE = "creto_policies"


def bundled_policies() -> Path:
    """The folder with ``schema.cedarschema``, ``default/`` and ``examples/``.

    An installed distribution carries it as the package ``creto_policies``; a checkout used in place has it as the
    top-level folder ``policies``. Raises FileNotFoundError when it is in neither place, which means a broken install.
    """
    spec = find_spec(PACKAGE)
    places = [Path(place) for place in (spec.submodule_search_locations or () if spec else ())]
    places.append(Path(__file__).resolve().parents[3] / "policies")
    for place in places:
        if (place / "schema.cedarschema").is_file():
            return place
    raise FileNotFoundError(f"the bundled policies are missing (looked in {', '.join(map(str, places))})")
