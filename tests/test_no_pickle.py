"""Nothing in the package runs code that comes with data: no pickle, no eval, no YAML that makes objects, no shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import thrifty

_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
_BUILTINS = {"eval", "exec", "compile", "__import__"}
_CALLS = {"torch.load", "torch.save", "np.save", "numpy.save", "pd.read_pickle", "os.system", "os.popen"}
_CALLS |= {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load"}
_LOADERS = {"yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.CLoader"}


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in names if name.split(".")[0] in _MODULES)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in _LOADERS:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: word.value for word in node.keywords}
            unsafe = [key for key in ("shell", "allow_pickle") if key in given and ast.unparse(given[key]) != "False"]
            if name in _CALLS or (isinstance(node.func, ast.Name) and name in _BUILTINS) or unsafe:
                yield ast.unparse(node)


def test_the_package_has_none() -> None:
    files = sorted(Path(thrifty.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    found = [f"{file.name}: {fault}" for file in files for fault in faults(ast.parse(file.read_text(encoding="utf-8")))]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import loads",
        "eval(x)",
        "torch.load(f)",
        "yaml.load(f, Loader=yaml.Loader)",
        "subprocess.run(x, shell=True)",
        "np.load(f, allow_pickle=True)",
        "class L(yaml.FullLoader): pass",
    ],
)
def test_each_of_them_would_be_found(text: str) -> None:
    assert list(faults(ast.parse(text)))
    assert not list(faults(ast.parse("model.eval(); subprocess.run(x, shell=False); yaml.safe_load(f)")))
