"""What must not come back, over syntax trees: floors of folders, and plain code.

A folder's modules import only from folders on lower floors, or earlier ones on its own
floor; within a folder from each other without a circle. A module in the root of
`polarjax` counts as a folder. Entry points, `__main__`, stand above everything.
"""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Lowest first; the order within a line counts too.
FLOORS = (
    "pallas_kernels",
    "polarjax.settings polarjax.storage polarjax.terminal",
    "polarjax.config polarjax.policy polarjax.summary polarjax.params polarjax.cache",
    "polarjax.mesh",
    "polarjax.model",
    "polarjax.policies",
    "polarjax.planning",
    "polarjax.engine",
    "polarjax.training",
    "polarjax.evaluation polarjax.evaluation.report polarjax.evaluation.lm_eval",
    "polarjax.calibration",
    "convert",
    "polarjax.loading",
    "polarjax.public polarjax",
    "polarjax.bench",
    "polarjax.cli",
)
ORDER = " ".join(FLOORS).split()
# The conversion knows nothing of decoding. The way back reads adapters.
CONVERT_NEEDS = (
    "convert",
    "polarjax.config",
    "polarjax.storage.files",
    "polarjax.storage.folder",
    "polarjax.params",
    "polarjax.model",
    "polarjax.storage.repository",
    "polarjax.storage.tensors",
    "polarjax.storage.writing",
    "polarjax.terminal.common",
    "polarjax.terminal.output",
)
EXPORT_NEEDS = (*CONVERT_NEEDS, "polarjax.policies.updates")
PACKAGES = ("pallas_kernels", "polarjax", "convert")
RUN_TIME = {
    "pallas_kernels": {"jax", "numpy", "jaxtyping", "pallas_kernels"},
    "polarjax": {
        "jax",
        "numpy",
        "jaxtyping",
        "flax",
        "optax",
        "orbax",
        "safetensors",
        "tokenizers",
        "jinja2",
        "rich",
        "ml_dtypes",
        "scipy",
        "pallas_kernels",
        "polarjax",
    },
    "convert": {
        "jax",
        "numpy",
        "ml_dtypes",
        "flax",
        "safetensors",
        "gguf",
        "tokenizers",
        "rich",
        "jinja2",
        "google",  # google.protobuf
        "polarjax",
        "convert",
    },
}
# Code in data, and private parts of others.
FORBIDDEN = (
    "pickle.",
    "cPickle.",
    "dill.",
    "jax._src.",
    "jax.experimental.pallas.ops.",
)


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> set[str]:
    """Modules, or names in modules, that a module imports anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import: write it in full"
            assert node.module
            for alias in node.names:
                # `from package import module` imports the module.
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
                if node.module not in MODULES:
                    found.add(whole)
        elif isinstance(node, ast.Call):
            # importlib.import_module("x") and __import__("x")
            called = ast.unparse(node.func).rsplit(".")[-1]
            if called in ("import_module", "__import__"):
                argument = node.args[0]
                assert isinstance(argument, ast.Constant), f"{name} hides an import"
                found.add(str(argument.value))
    return found


def folder(name: str) -> str:
    """The one that a module's place is said of."""
    top, *rest = name.split(".")
    if top != "polarjax":
        return top  # its order inside follows from its imports
    if not rest or MODULES[name].name == "__init__.py":
        return name
    return name if len(rest) == 1 else name.rpartition(".")[0]


def upward(name: str, imported: set[str]) -> list[str]:
    """Of the imported modules, those whose folder does not stand before this one's."""
    if name.endswith("__main__"):
        return []
    own = [i for i in imported if i.split(".")[0] in PACKAGES]
    here = ORDER.index(folder(name))
    return [
        i for i in own if i not in MODULES or i == name or ORDER.index(folder(i)) > here
    ]


def test_every_folder_has_its_place():
    entries = {name for name in MODULES if name.endswith("__main__")}
    assert {folder(name) for name in set(MODULES) - entries} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    assert not upward(name, imports(name, MODULES[name]))


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import each other in a circle, or are above such ones."""
    left = dict(graph)
    while free := [name for name in left if not left[name] & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def test_modules_import_each_other_without_a_circle():
    # Its own package counts where it says more than its name.
    graph = {n: imports(n, path) & set(MODULES) - {n} for n, path in MODULES.items()}
    del graph["polarjax"]  # names that are looked up at their first use
    assert not circles(graph)
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


def test_the_root_holds_what_users_name():
    assert len(list((REPOSITORY / "polarjax").glob("*.py"))) <= 10


@pytest.mark.parametrize("name", MODULES)
def test_run_time_dependencies(name):
    allowed = RUN_TIME[name.split(".")[0]] | sys.stdlib_module_names
    if name == "pallas_kernels.tuning.tune":  # a command, not a kernel
        allowed |= {"rich"}
    # What an extra brings is imported by those alone who say when it is missing.
    if name in (
        "polarjax.evaluation.lm_eval.model",
        "polarjax.evaluation.lm_eval.tasks",
    ):
        allowed |= {"lm_eval"}
    if name in ("polarjax.evaluation.report.plots", "polarjax.bench.plots"):
        allowed |= {"matplotlib"}
    if name == "polarjax.training.text":
        allowed |= {"datasets"}
    if name in ("polarjax.loading", "polarjax.storage.repository"):
        allowed |= {"huggingface_hub", "convert"}
    if name == "polarjax.cli.plan":  # a model need not be converted to be planned
        allowed |= {"convert"}
    if name in ("polarjax.cli.main", "polarjax.cli.convert"):
        allowed |= {"convert"}
    if name == "convert.verify":
        allowed |= {"torch", "transformers"}
    imported = imports(name, MODULES[name])
    assert {i.split(".")[0] for i in imported} <= allowed
    for module in imported:
        assert not f"{module}.".startswith(FORBIDDEN), module


@pytest.mark.parametrize("name", MODULES)
def test_rooms_that_must_not_know_each_other(name):
    imported = imports(name, MODULES[name])
    own = [i for i in imported if i.split(".")[0] in PACKAGES]
    if name.startswith("polarjax.model"):
        assert not [i for i in own if i.startswith("polarjax.policies")]
    if name.split(".")[0] == "convert" and name != "convert.__main__":
        needs = EXPORT_NEEDS if name == "convert.export" else CONVERT_NEEDS
        assert not [i for i in own if not i.startswith(needs)]


# Where plain arguments and short functions are still to come. What is mended leaves.
MOST_PARAMETERS, MOST_LINES = 10, 80
OUR_CODE = {
    path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for package in (*PACKAGES, "benchmarks")
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}


def hidden_arguments(code: ast.AST) -> list[int]:
    """Lines where a literal is unpacked: what is in it could stand there as it is."""
    found = []
    for node in ast.walk(code):
        if isinstance(node, ast.Starred):
            if isinstance(node.value, ast.Tuple | ast.List | ast.Set):
                found.append(node.lineno)
        elif isinstance(node, ast.Call):
            given = [each.value for each in node.keywords if each.arg is None]
            found += [each.lineno for each in given if isinstance(each, ast.Dict)]
        elif isinstance(node, ast.Dict):
            inside = zip(node.keys, node.values, strict=True)
            found += [
                value.lineno
                for key, value in inside
                if key is None and isinstance(value, ast.Dict)
            ]
    return sorted(found)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a function has, `self` and `cls` apart."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    count = sum(each.arg not in ("self", "cls") for each in named)
    return count + (given.vararg is not None) + (given.kwarg is not None)


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of a function, its docstring among them."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def functions(code: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All of a module, those inside of others too."""
    nodes = ast.walk(code)
    return [x for x in nodes if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)]


def public(path: str) -> set[str]:
    """Of a module's functions and classes those that `polarjax` offers."""
    module = path.removesuffix(".py").replace("/", ".")
    return {
        alias.name
        for node in OUR_CODE["polarjax/public.py"].body
        if isinstance(node, ast.ImportFrom) and node.module == module
        for alias in node.names
    }


def test_no_call_hides_its_arguments():
    found = [
        f"{path}:{line}"
        for path, code in OUR_CODE.items()
        for line in hidden_arguments(code)
    ]
    assert not found, "write what is unpacked as it is"


def test_functions_have_few_parameters_and_are_short():
    found = [
        f"{path}: {each.name}, {parameters(each)} parameters, {lines(each)} lines"
        for path, code in OUR_CODE.items()
        # Kernels say much at once.
        if not path.startswith("pallas_kernels/")
        for each in functions(code)
        if parameters(each) > MOST_PARAMETERS or lines(each) > MOST_LINES
        # What users call may have many.
        if each.name not in public(path)
        if each.name != "__init__" or "Engine" not in public(path)
    ]
    assert not found, "group the parameters, split the function"


def test_the_checks_of_plain_code_see_what_they_should():
    for code in (
        "f(*(a, b), c)",
        "f(*[a])",
        "f(**{'x': 1})",
        "f(**{**a, 'x': 1})",
        "x = {*('a', 'b'), *c}",
        "x = (*('a',), 'b')",
        "x = {**{'a': 1}, 'b': 2}",
    ):
        assert hidden_arguments(ast.parse(code)) == [1], code
    for code in (
        "f(*a, **b)",
        "f(*(x for x in a), *(b if c else ()))",
        "f(**{name: 1 for name in a})",
        "x = (*a, b)",
        "x = {**a, 'b': 2}",
    ):
        assert not hidden_arguments(ast.parse(code)), code
    code = "class A:\n  def f(self, a, /, b, *c, d=1, **e): ..."
    [one] = functions(ast.parse(code))
    assert parameters(one) == 5 and lines(one) == 1
    assert public("polarjax/params.py") == {"Params", "save"}


def test_the_check_sees_what_it_should(tmp_path):
    def check(name, code):
        path = tmp_path / "module.py"
        path.write_text(code)
        return upward(name, imports(name, path))

    up = "polarjax.policy"
    assert check(up, "import polarjax.model") == ["polarjax.model"]
    assert check(up, "from polarjax import loading") == ["polarjax.loading"]
    assert check(up, "def f():\n  from polarjax.model import mlp") == [
        "polarjax.model.mlp"
    ]
    assert check(up, "import polarjax") == ["polarjax"]
    assert check(up, "from polarjax import Params") == ["polarjax"]
    assert check(up, "import polarjax.policy") == ["polarjax.policy"]
    assert check(up, "import polarjax.nowhere") == ["polarjax.nowhere"]
    assert check(up, "import importlib\nimportlib.import_module('convert')") == [
        "convert"
    ]
    assert check(up, "from polarjax.config import ModelConfig\nimport jax") == []
    with pytest.raises(AssertionError, match="relative import"):
        check(up, "from . import hub")


KINDS = ("Polar", "Adaptive", "Oracle", "Random", "Routed", "Quest", "MeanKey")


def policies_named(code: ast.AST) -> list[int]:
    """Lines that name a policy class, ask what kind of policy one is, or guess fields.

    `Dense` is what is no policy at all, and may be named.
    """
    found = []
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and node.module != "polarjax":
            if {alias.name for alias in node.names} & set(KINDS):
                found.append(node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr in KINDS:
            if ast.unparse(node.value) == "random":
                continue  # Python's own
            found.append(node.lineno)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = ast.unparse(node.args[0]) if node.args else ""
            about = "policy" in given.split(".")[-1] or "bound" in given
            kind = ast.unparse(node.args[1]) if len(node.args) > 1 else ""
            if called in ("getattr", "hasattr") and about:
                found.append(node.lineno)
            elif called == "isinstance" and about and kind not in ("Policy", "type"):
                found.append(node.lineno)
    return found


def test_nobody_looks_behind_the_protocol_of_policies():
    found = [
        f"{path}:{line}"
        for path, code in OUR_CODE.items()
        if not path.startswith("polarjax/policies/")
        # Which offer them to users.
        if path not in ("polarjax/public.py", "polarjax/__init__.py")
        for line in policies_named(code)
    ]
    assert not found, "ask the policy, or take it from polarjax.policies.named"
    for wrong in (
        "from polarjax.policies import Polar",
        "from polarjax.policies.polar import Polar, x",
        "polarjax.Oracle(0.5)",
        "getattr(policy, 'budget')",
        "isinstance(self.policy, Fixed)",
    ):
        assert policies_named(ast.parse(wrong)) == [1], wrong
    for right in (
        "policy.reads(c, x)",
        "isinstance(policy, Policy)",
        "getattr(a, 'b')",
    ):
        assert not policies_named(ast.parse(right)), right


def cache_opened(code: ast.AST) -> list[int]:
    """Lines that take keys or values out of a cache."""
    return [
        node.lineno
        for node in ast.walk(code)
        if isinstance(node, ast.Attribute) and node.attr in ("keys", "values")
        if "cache" in ast.unparse(node.value).lower()
    ]


def test_nobody_knows_how_the_cache_lies_in_memory():
    found = [
        f"{path}:{line}"
        for path, code in OUR_CODE.items()
        if path.startswith("polarjax/") and path != "polarjax/cache.py"
        for line in cache_opened(code)
    ]
    assert not found, "ask the cache: polarjax/cache.py alone knows its arrays"
    assert cache_opened(ast.parse("x = state.cache.keys[0]")) == [1]
    assert not cache_opened(ast.parse("x = {}.keys()"))
