"""The packages that are installed beside this one, told from others of their names."""

import importlib.util
import os
import sys

# Where polarjax itself lies.
_HOME = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))


def check_ours(name: str) -> None:
    """Raise unless `import name` finds the package that belongs to polarjax.

    Python looks first where a script lies, or in the folder that it was started in: a
    `convert.py` or a folder `convert` of the user's own is then found instead.

    Args:
      name: "convert" or "pallas_kernels".

    Raises:
      ImportError: naming the file that is found.
    """
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.find_spec(name)
        found = spec and (spec.origin or str(spec.submodule_search_locations))
    else:
        found = getattr(module, "__file__", None)
    ours = os.path.join(_HOME, name, "__init__.py")
    if found is None:
        raise ImportError(f"polarjax needs {ours}, which is missing: install it again")
    if os.path.realpath(found) != os.path.realpath(ours):
        raise ImportError(
            f"{found} is found in the place of polarjax's own `{name}`: rename it, or "
            "call polarjax from another folder"
        )
