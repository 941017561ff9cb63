"""The walls between the rooms, read from the imports of every file; each rule is shown to catch a planted breach."""

import ast
import configparser
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("zoo", "datamodules", "strategies")
# The command line and the hub see everything.
GATEWAYS = ("zoo.cli", "zoo.__main__")
# Files that plug the science into Lightning, transformers or an evaluation harness.
WIRING = (
    "__init__",
    "module",
    "history_clicks",
    "baselines",
    "refresh",
    "preference",
    "latent_encoder",
    "official",
    "evaluation",
    "likelihood_bounds",
    "step_weights",
    "trained_types",
    "state_dict_adapter",
    "transformers_model",
    "lm_eval_adapter",
    "hf_decoder",
    "strategy",
    "divided_strategy",
    "paro_role",
    "refusals",
    "data_statistics_writer",
    "latent_cache_writer",
    "router_monitor",
    "backbone",
    "hf_backbone",
    "language_module",
    "loading",
    "sources",
    "tuning",
    "tuned_backbone",
    "weighter_module",
    "weights_writer",
    "curriculum",
    "trained_backbone",
    "reward_model",
    "rewards",
    "recommender",
    "sasrec",
    "item_index",
)
# Science that is a library of an extra behind our own interface, or rows on disk.
WRAPPED = {"dc_ae": {"diffusers"}, "atom_store": {"numpy"}}
FOUNDATION_OF_SCIENCE = (
    "zoo.base", "zoo.nn", "zoo.lm", "zoo.role_placement", "strategies.divided_rows", "strategies.mesh", "strategies.whole_state",
    "typing_extensions",
)  # fmt: skip
ASSETS = "datamodules.assets"  # archives of package registries: pretrained weights ride in them too, and they import no data
LANGUAGE_MODELS = "zoo.lm"  # foundation of methods, though it has a module of its own
PICKLES = ("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base2"}


class Import(NamedTuple):
    """One imported module, and where."""

    importer: str
    target: str
    place: str
    at_top: bool
    for_types: bool

    def within(self, *names: str) -> bool:
        return any(self.target == name or self.target.startswith(name + ".") for name in names)


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def imports(path: Path, root: Path) -> Iterable[Import]:
    """As :func:`read_imports`; files of this tree are read once for all rules."""
    return imports_of_this_tree(path) if root == ROOT else read_imports(path, root)


@functools.cache
def imports_of_this_tree(path: Path) -> tuple[Import, ...]:
    return tuple(read_imports(path, ROOT))


def read_imports(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, for type checkers too; ``from a import b`` names ``a.b`` where that is a module, else ``a``."""

    def visit(node: ast.AST, at_top: bool, for_types: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, at_top, for_types
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from visit(child, at_top and not inside and not checked, for_types or checked)

    importer = module_name(path, root)
    for node, at_top, for_types in visit(parsed(path.read_text()), True, False):
        place = f"{path.relative_to(root)}:{node.lineno}"
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            parents = importer.split(".") if path.stem == "__init__" else importer.split(".")[:-1]
            above = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" if is_module(f"{source}.{alias.name}", root) else source
                       for alias in node.names]  # fmt: skip
        yield from (Import(importer, target, place, at_top, for_types) for target in dict.fromkeys(targets))


def is_module(name: str, root: Path) -> bool:
    path = root.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def methods(root: Path) -> list[str]:
    rooms = [f"zoo.{path.parent.name}" for path in sorted((root / "zoo").glob("*/module.py"))]
    return [room for room in rooms if room != LANGUAGE_MODELS]


def science_knows_torch_only(root: Path) -> list[str]:
    """Science imports torch (and its files), the standard library, its own room, what is made for it; never Lightning."""
    rooms = [
        *methods(root),
        *(f"strategies.{path.parent.name}" for path in (root / "strategies").glob("*/strategy.py")),
    ]
    science = [(room, path) for room in rooms for path in files(root, room.replace(".", "/"))]
    science += [(room, path) for room in ("zoo.nn", LANGUAGE_MODELS) for path in files(root, room.replace(".", "/"))]
    science += [("strategies", path) for path in (root / "strategies").glob("[a-z]*.py")]
    breaches = []
    for room, path in science:
        if path.stem in WIRING:
            continue
        for found in imports(path, root):
            own = found.within(room) and found.target.rpartition(".")[2] not in WIRING
            library = found.target.partition(".")[0] in {"torch", "safetensors", *sys.stdlib_module_names} | WRAPPED.get(
                path.stem, set()
            )
            foundation = found.within(*FOUNDATION_OF_SCIENCE) and found.target != f"{LANGUAGE_MODELS}.module"
            if not (own or library or foundation or found.for_types):
                breaches.append(f"{found.place} science imports {found.target}")
    return breaches


def methods_know_no_data_and_no_strategy(root: Path) -> list[str]:
    """A method imports no DataModule, no strategy, and of another method only the public names of its package."""
    breaches = []
    for room in methods(root):
        others = [other for other in methods(root) if other != room]
        for path in files(root, room.replace(".", "/")):
            for found in imports(path, root):
                inside = found.within(*others) and found.target not in others
                if found.within("datamodules", "strategies", *GATEWAYS) or inside:
                    breaches.append(f"{found.place} method imports {found.target}")
    return breaches


def foundation_knows_no_method(root: Path) -> list[str]:
    """What methods stand on imports no method, DataModule or strategy; only the command line and the hub see all."""
    rooms = tuple(room.replace(".", "/") + "/" for room in methods(root))
    breaches = []
    for path in files(root, "zoo"):
        if (
            path.relative_to(root).as_posix().startswith(rooms)
            or module_name(path, root).startswith(GATEWAYS)
            or path == root / "zoo/__init__.py"
        ):
            continue
        for found in imports(path, root):
            if found.within("datamodules", "strategies", *methods(root)) and not found.within(ASSETS):
                breaches.append(f"{found.place} foundation imports {found.target}")
    return breaches


def command_line_knows_no_method(root: Path) -> list[str]:
    """The command line finds methods by their public names, so that a new one changes no file of it."""
    paths = [*files(root, "zoo/cli"), *(root / "zoo").glob("[_a-z]*.py")]
    return [
        f"{found.place} names {found.target}" for path in paths for found in imports(path, root) if found.within(*methods(root))
    ]


def data_and_strategies_know_no_method(root: Path) -> list[str]:
    """DataModules and strategies import no method, and not one another."""
    breaches = []
    for package, other in (("datamodules", "strategies"), ("strategies", "datamodules")):
        for path in files(root, package):
            for found in imports(path, root):
                if found.within(other, *GATEWAYS, *methods(root)):
                    breaches.append(f"{found.place} {package} imports {found.target}")
    return breaches


def imports_run_in_no_circle(root: Path) -> list[str]:
    """Imports never lead back to where they began, those inside functions and for type checkers included.

    A package's ``__init__`` that names its own files, lazily or not, is its table of contents and makes no circle.
    """
    graph: dict[str, set[str]] = {}
    for path in files(root, *PACKAGES):
        name = module_name(path, root)
        targets = {found.target for found in imports(path, root) if is_module(found.target, root)}
        graph[name] = {t for t in targets if t != name and not (path.stem == "__init__" and t.startswith(f"{name}."))}
    breaches, done = [], set()

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            breaches.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                walk(target, [*way, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return breaches


def needs_no_extra(root: Path) -> list[str]:
    """What is imported at the top of a file is the standard library or a declared dependency, never an extra."""
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    declared = {canonical(re.split(r"[\[<>=~!]", line)[0].strip()) for line in lines if line.strip()}
    owners = packages_distributions()
    return [
        f"{found.place} imports {found.target}, which setup.cfg does not list under install_requires"
        for path in files(root, *PACKAGES)
        for found in imports(path, root)
        for package in [found.target.partition(".")[0]]
        if found.at_top
        and package not in {*PACKAGES, *sys.stdlib_module_names}
        and not declared & {canonical(owner) for owner in owners.get(package, [])}
    ]


packages_distributions = functools.cache(metadata.packages_distributions)


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def strategies_are_asked_by_function(root: Path) -> list[str]:
    """Modules and callbacks ask strategies, and strategies ask callbacks, through `zoo.strategy_contract`, never by a string."""
    asked = {"zoo": "strategy|engine", "datamodules": "strategy", "strategies": "callback"}
    return [
        f"{path.relative_to(root)}:{node.lineno} {ast.unparse(node)}"
        for package, subject in asked.items()
        for path in files(root, package)
        for node in ast.walk(parsed(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and isinstance(node.args[1], ast.Constant)
        and re.search(rf"(^|[._])({subject})$", ast.unparse(node.args[0]))
    ]


def nothing_is_unpickled(root: Path) -> list[str]:
    """No file can run code by being read: weights_only=True, and an unpickler only with a find_class of its own."""
    return [
        f"{path.relative_to(root)}:{node.lineno} {ast.unparse(node)}"
        for path in files(root, *PACKAGES, "benchmarks", "examples")
        for node in unsafe_loads(parsed(path.read_text()))
    ]


def unsafe_loads(tree: ast.AST) -> Iterator[ast.expr | ast.ImportFrom]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call | ast.Attribute | ast.ImportFrom | ast.ClassDef)]
    guarded = {
        id(base)
        for node in nodes
        if isinstance(node, ast.ClassDef)
        and any(isinstance(item, ast.FunctionDef) and item.name == "find_class" for item in node.body)
        for base in node.bases
    }
    for node in nodes:
        if isinstance(node, ast.Call):
            given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            loads = isinstance(node.func, ast.Attribute) and node.func.attr == "load" and ast.unparse(node.func) == "torch.load"
            if given.get("weights_only", not loads) is not True or given.get("allow_pickle") is True:
                yield node
        elif isinstance(node, ast.Attribute) and node.attr in ("load", "loads", "open", "Unpickler"):
            if ast.unparse(node.value) in PICKLES and id(node) not in guarded:
                yield node
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module in PICKLES
            and {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}
        ):
            yield node


def files_are_named_by_their_idea(root: Path) -> list[str]:
    """No drawer of odds and ends: utils, helpers, common, misc."""
    places = files(root, *PACKAGES, "benchmarks", "examples", "tests")
    return [
        f"{path.relative_to(root)} is named by no idea"
        for path in places
        if {*path.relative_to(root).parent.parts, *path.stem.split("_")} & FORBIDDEN_NAMES
    ]


def files_of_tests_are_flat(root: Path) -> list[str]:
    """Test folders are no packages (tests/zoo would shadow zoo), and no two test files share a name."""
    names = Counter(path.name for path in files(root, "tests") if path.name != "conftest.py")
    packages = [f"{path.relative_to(root)} makes a package of a test folder" for path in files(root, "tests")
                if path.name == "__init__.py"]  # fmt: skip
    return packages + [f"{count} test files are called {name}" for name, count in names.items() if count > 1]


def methods_have_their_rooms(root: Path) -> list[str]:
    """Whoever knows one method's folder knows all: each has a model card."""
    folders = [root / room.replace(".", "/") for room in methods(root)]
    return [f"{folder.relative_to(root)} has no README.md" for folder in folders if not (folder / "README.md").exists()]


BREACHES: dict[Callable[[Path], list[str]], dict[str, str]] = {
    science_knows_torch_only: {
        "zoo/one/flow.py": "import lightning",
        "zoo/one/head.py": "from zoo.one.module import One",
        "zoo/nn/attention.py": "def f():\n    import numpy",
        "zoo/lm/generation.py": "import transformers",
        "zoo/two/decoder.py": "from zoo.lm.module import CausalLM",
        "strategies/shard/ring.py": "from lightning.pytorch import Trainer",
        "strategies/mesh.py": "import lightning",
    },
    methods_know_no_data_and_no_strategy: {
        "zoo/one/module.py": "from datamodules import Digits",
        "zoo/one/network.py": "import strategies.shard",
        "zoo/two/module.py": "from zoo.one import flow",
        "zoo/two/network.py": "from ..one.flow import Flow",
    },
    foundation_knows_no_method: {
        "zoo/module.py": "def f():\n    from zoo.one import One",
        "zoo/metrics/fid.py": "import datamodules",
        "zoo/lm/module.py": "from zoo.two import Two",
    },
    command_line_knows_no_method: {
        "zoo/cli/listing.py": "import zoo.one",
        "zoo/cli/parser.py": "def f():\n    from zoo.two.network import Network",
        "zoo/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from zoo import one",
    },
    data_and_strategies_know_no_method: {
        "datamodules/digits.py": "from zoo.one import One",
        "strategies/shard/strategy.py": "import zoo.two.module",
        "strategies/mesh.py": "import datamodules",
    },
    imports_run_in_no_circle: {
        "zoo/first.py": "from zoo.second import a",
        "zoo/second.py": "import zoo.first",
        "zoo/third.py": "def f():\n    import zoo.fourth",
        "zoo/fourth.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zoo.third",
    },
    needs_no_extra: {"zoo/spelling.py": "import hypothesis", "zoo/plan.py": "import no_such_package"},
    strategies_are_asked_by_function: {
        "zoo/one/module.py": "group = getattr(self.trainer.strategy, 'step_group', None)",
        "zoo/callbacks/guard.py": "def f(strategy):\n    return hasattr(strategy, 'gradient_norm')",
        "strategies/shard/strategy.py": "averages = getattr(callback, 'averages_shards', False)",
    },
    nothing_is_unpickled: {
        "zoo/one/reader.py": "import torch\ntorch.load('x', weights_only=False)",
        "zoo/two/reader.py": "import torch\ntorch.load('x')",
        "datamodules/cifar.py": "import pickle\npickle.load(open('x', 'rb'))",
        "datamodules/reader.py": "from pickle import loads",
        "examples/plain.py": "import pickle\npickle.Unpickler(open('x', 'rb'))",
    },
    files_are_named_by_their_idea: {"zoo/one/utils.py": "", "zoo/common/flow.py": "", "tests/string_helpers.py": ""},
    files_of_tests_are_flat: {"tests/zoo/__init__.py": "", "tests/one/test_flow.py": "", "tests/two/test_flow.py": ""},
}
ALLOWED = {
    "setup.cfg": "[options]\ninstall_requires =\n    torch>=2\n    lightning>=2.6\n    jsonargparse[signatures]>=4\n",
    "zoo/__init__.py": "",
    "zoo/base/hyperparameters.py": "import jsonargparse",
    "zoo/module.py": "import lightning\nimport zoo\nfrom zoo.base.hyperparameters import Configurable",
    "zoo/cli/command.py": "import datamodules\nimport strategies",
    "zoo/one/__init__.py": "from zoo.one.module import One",
    "zoo/one/module.py": "from zoo.one.flow import Flow\nfrom zoo.module import ZooModule",
    "zoo/one/README.md": "",
    "zoo/one/flow.py": "import math\nimport torch\nfrom zoo.base.hyperparameters import Configurable\nfrom . import head",
    "zoo/one/head.py": "import torch",
    "zoo/one/solvers/euler.py": "from zoo.one.flow import Flow",
    "zoo/two/module.py": "from zoo.one import One\ndef f():\n    import gguf",
    "zoo/two/README.md": "",
    "zoo/two/decoder.py": "from zoo.lm.generation import generate",
    "zoo/lm/module.py": "import lightning",
    "datamodules/__init__.py": "",
    "datamodules/safe.py": "import pickle\nclass Safe(pickle.Unpickler):\n    def find_class(self, m, n): ...",
    "strategies/__init__.py": "",
    "strategies/shard/strategy.py": "import lightning\nfrom strategies import mesh",
    "strategies/mesh.py": "import torch",
    "tests/one/test_one.py": "import zoo",
}


def plant(root: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("rule", [*BREACHES, methods_have_their_rooms], ids=lambda rule: rule.__name__)
def test_wall_stands(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", BREACHES, ids=lambda rule: rule.__name__)
def test_rule_finds_what_is_planted_and_nothing_else(rule: Callable[[Path], list[str]], tmp_path: Path) -> None:
    assert rule(plant(tmp_path, ALLOWED)) == []
    plant(tmp_path, BREACHES[rule])
    found = " ".join(rule(tmp_path))
    for name in BREACHES[rule]:
        assert name in found or Path(name).name in found or module_name(tmp_path / name, tmp_path) in found


def test_method_without_card_is_found(tmp_path: Path) -> None:
    plant(tmp_path, ALLOWED)
    (tmp_path / "zoo/two/README.md").unlink()
    assert methods_have_their_rooms(tmp_path) == ["zoo/two has no README.md"]


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["list"]], ids=" ".join)
def test_no_framework_is_loaded_by_the_package_and_the_light_verbs(words: list[str]) -> None:
    code = """import sys, zoo.__main__
try:
    sys.exit(zoo.__main__.main() if sys.argv[1:] else 0)
finally:
    print({'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
