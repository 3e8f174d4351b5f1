"""A module imports only modules on lower floors, or earlier ones on its own.

The whole order, lowest first. A new module must be given its place here. A package's
`__init__` stands behind its modules.
"""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

FLOORS = {
    0: """
        pallas_kernels._backend
        pallas_kernels._dot
        pallas_kernels._put
        pallas_kernels._sizes
        pallas_kernels.tuning.table
        pallas_kernels.tuning.timing
        pallas_kernels.attention.configs
        pallas_kernels.attention.reference
        pallas_kernels.attention.shares
        pallas_kernels.attention.combine
        pallas_kernels.attention.triton
        pallas_kernels.attention.hopper
        pallas_kernels.attention.stream
        pallas_kernels.attention.mosaic
        pallas_kernels.attention.api
        pallas_kernels.attention
        pallas_kernels.mlp.activations
        pallas_kernels.mlp.configs
        pallas_kernels.mlp.reference
        pallas_kernels.mlp.tiles
        pallas_kernels.mlp.one_kernel
        pallas_kernels.mlp.triton
        pallas_kernels.mlp.api
        pallas_kernels.mlp
        pallas_kernels.heads.reference
        pallas_kernels.heads.triton
        pallas_kernels.heads.api
        pallas_kernels.heads
        pallas_kernels.norm.reference
        pallas_kernels.norm.triton
        pallas_kernels.norm.api
        pallas_kernels.norm
        pallas_kernels.select.search
        pallas_kernels.select.triton
        pallas_kernels.select.heads
        pallas_kernels.select.neurons
        pallas_kernels.select
        pallas_kernels.tuning.problems
        pallas_kernels.tuning.search
        pallas_kernels.tuning.tune
        pallas_kernels.tuning
        pallas_kernels
    """,
    1: """
        polarjax.files
        polarjax.checked
        polarjax.arguments
        polarjax.arguments.common
        polarjax.arguments.choices
        polarjax.arguments.processes
        polarjax.arguments.generate
        polarjax.arguments.calibrate
        polarjax.arguments.evaluate
        polarjax.arguments.plan
        polarjax.terminal
        polarjax.siblings
        polarjax.config
        polarjax.settings
        polarjax.writing
        polarjax.folder
        polarjax.checksums
        polarjax.tensors
        polarjax.host_memory
        polarjax.summary
        polarjax.params
        polarjax.cache
        polarjax.policy
        polarjax.repository
        polarjax.native_log
        polarjax.distributed
    """,
    2: """
        polarjax.sharding
        polarjax.model.linear
        polarjax.model.norms
        polarjax.model.share
        polarjax.model.positions
        polarjax.model.causal
        polarjax.model.attention
        polarjax.model.mlp
        polarjax.model.layer
        polarjax.model.decoder
        polarjax.model
    """,
    3: """
        polarjax.sparsity.select
        polarjax.sparsity.updates
        polarjax.sparsity.neurons
        polarjax.sparsity.routers
        polarjax.sparsity.cost
        polarjax.sparsity.polar
        polarjax.sparsity.distance
        polarjax.sparsity.budgets
        polarjax.sparsity.card
        polarjax.sparsity.fingerprint
        polarjax.sparsity.adapter
        polarjax.sparsity
        polarjax.generation.sampling
        polarjax.generation.detokenize
        polarjax.generation.templates
        polarjax.generation.tokenizer
        polarjax.generation.text
        polarjax.generation.requests
        polarjax.generation.blocks
        polarjax.generation.places
        polarjax.generation.loop
        polarjax.generation.stats
        polarjax.generation.crossover
        polarjax.generation.memory
        polarjax.generation.api
        polarjax.generation
        polarjax.per_device
        polarjax.devices
        polarjax.planning
    """,
    4: """
        convert.arguments
        convert.source
        convert.files
        convert.tokenizing.no_text
        convert.tokenizing.added
        convert.tokenizing.byte_level
        convert.tokenizing.sentence_piece
        convert.tokenizing.folder
        convert.tokenizing.gguf
        convert.tokenizing
        convert.special_tokens
        convert.tokenizer
        convert.rules.rule
        convert.rules.fields
        convert.rules.rope
        convert.readers.gguf_header
        convert.readers.gguf_parts
        convert.readers.gguf
        convert.readers.names
        convert.readers.huggingface
        convert.readers
        convert.rules.llama
        convert.rules.opt
        convert.rules
        convert.hub
        convert.places
        convert.describe
        convert.core
        convert.same_tokens
        convert.verify
        convert
        polarjax.training.text
        polarjax.training.self_text
        polarjax.training.loop
        polarjax.training.outcome
        polarjax.training.collect
        polarjax.training.losses
        polarjax.training.neurons
        polarjax.training.unions
        polarjax.training.neuron_budgets
        polarjax.training.thresholds
        polarjax.training.train
        polarjax.training.recover
        polarjax.training
        polarjax.evaluation.statistics
        polarjax.evaluation.batches
        polarjax.evaluation.programs
        polarjax.evaluation.scoring
        polarjax.evaluation.measure
        polarjax.evaluation.perplexity
        polarjax.evaluation.search
        polarjax.evaluation.contract
        polarjax.evaluation.recall
        polarjax.evaluation.tasks
        polarjax.evaluation.damage
        polarjax.evaluation.journal
        polarjax.evaluation.record
        polarjax.evaluation.results
        polarjax.evaluation.run
        polarjax.evaluation.polar_lm
        polarjax.evaluation.lm_eval
        polarjax.evaluation.plots
        polarjax.evaluation.report_data
        polarjax.evaluation.report
        polarjax.evaluation
        polarjax.quality
        polarjax.calibration
        polarjax.recovery
    """,
    5: """
        polarjax.hub
        convert.export
        convert.command
        convert.__main__
        polarjax.public
        polarjax.demo
        polarjax.console
        polarjax.generate_cli
        polarjax.calibrate_cli
        polarjax.evaluate_cli
        polarjax.plan_cli
        polarjax.compile_cache
        polarjax.cli
        polarjax
        polarjax.__main__
    """,
}
ORDER = [name for floor in sorted(FLOORS) for name in FLOORS[floor].split()]
# The conversion knows nothing of decoding. The way back reads adapters.
CONVERT_NEEDS = (
    *("convert", "polarjax.config", "polarjax.files", "polarjax.folder"),
    *("polarjax.params", "polarjax.model", "polarjax.repository", "polarjax.writing"),
    *("polarjax.arguments.common", "polarjax.terminal"),
)
EXPORT_NEEDS = (*CONVERT_NEEDS, "polarjax.hub", "polarjax.sparsity.updates")
PACKAGES = ("pallas_kernels", "polarjax", "convert")
RUN_TIME = {
    "pallas_kernels": {"jax", "numpy", "jaxtyping", "pallas_kernels"},
    "polarjax": {
        *("jax", "numpy", "jaxtyping", "flax", "optax", "orbax", "safetensors"),
        *("tokenizers", "jinja2", "rich", "ml_dtypes", "scipy"),
        *("pallas_kernels", "polarjax"),
    },
    "convert": {
        *("jax", "numpy", "ml_dtypes", "flax", "safetensors", "gguf", "tokenizers"),
        *("rich", "jinja2", "google", "polarjax", "convert"),  # google.protobuf
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


def upward(name: str, imported: set[str]) -> list[str]:
    """The imported modules that do not stand before a module."""
    own = [i for i in imported if i.split(".")[0] in PACKAGES]
    return [i for i in own if i not in ORDER or ORDER.index(i) >= ORDER.index(name)]


def test_every_module_has_its_place():
    missing = sorted(set(MODULES) - set(ORDER))
    assert not missing, f"give these modules a place in FLOORS: {missing}"
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    assert not upward(name, imports(name, MODULES[name]))


@pytest.mark.parametrize("name", MODULES)
def test_run_time_dependencies(name):
    allowed = RUN_TIME[name.split(".")[0]] | sys.stdlib_module_names
    if name == "pallas_kernels.tuning.tune":  # a command, not a kernel
        allowed |= {"rich"}
    # What an extra brings is imported by those alone who say when it is missing.
    if name in ("polarjax.evaluation.polar_lm", "polarjax.evaluation.lm_eval"):
        allowed |= {"lm_eval"}
    if name == "polarjax.evaluation.plots":
        allowed |= {"matplotlib"}
    if name == "polarjax.training.text":
        allowed |= {"datasets"}
    if name in ("polarjax.hub", "polarjax.repository"):
        allowed |= {"huggingface_hub", "convert"}
    if name == "polarjax.plan_cli":  # a model need not be converted to be planned
        allowed |= {"convert"}
    if name == "polarjax.cli":  # `polarjax bench` and `polarjax convert`
        allowed |= {"benchmarks", "convert"}
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
        assert not [i for i in own if i.startswith("polarjax.sparsity")]
    if name.split(".")[0] == "convert":
        needs = EXPORT_NEEDS if name == "convert.export" else CONVERT_NEEDS
        assert not [i for i in own if not i.startswith(needs)]


def test_the_check_sees_what_it_should(tmp_path):
    def check(name, code):
        path = tmp_path / "module.py"
        path.write_text(code)
        return upward(name, imports(name, path))

    up = "polarjax.policy"
    assert check(up, "import polarjax.model") == ["polarjax.model"]
    assert check(up, "from polarjax import hub") == ["polarjax.hub"]
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
    assert check(up, "from polarjax.params import Params\nimport jax") == []
    with pytest.raises(AssertionError, match="relative import"):
        check(up, "from . import hub")
