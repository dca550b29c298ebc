"""Who may import whom: the diagram of DESIGN.md, enforced."""

import ast
import subprocess
import sys
from pathlib import Path

import erlangen

ROOT = Path(erlangen.__file__).parent

# package -> packages of ours that it may import
ALLOWED = {
    "finite": set(),
    "gauge": set(),
    "interop": {"breaking", "gauge", "optim"},
    "lie": set(),
    "optim": set(),
    "breaking": {"gauge"},
    "testing": {"finite", "gauge", "lie", "breaking"},
    "report": set(),
    "lm": {"gauge", "breaking", "optim"},
    "studies": {"finite", "gauge", "lie", "breaking", "optim", "lm", "report"},
    "bench": {"lie", "report"},
    "cli": {"finite", "gauge", "interop", "lie", "breaking", "optim", "lm", "report", "studies", "bench"},
}
SHARED = {"_extras", "__version__"}


def imports(path: Path) -> set[str]:
    """The packages of ours that one file imports, wherever in the file."""
    package = ["erlangen", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "erlangen" else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("erlangen.")}
    return found


def test_import_directions():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == set(ALLOWED), "a package is missing from the table of import directions"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in ROOT.glob("*/**/*.py")
        for name in imports(path)
        if name not in ALLOWED[path.relative_to(ROOT).parts[0]] | {path.relative_to(ROOT).parts[0]} | SHARED
    ]
    assert not wrong


def test_the_checker_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "gauge" / "x.py"
    path.parent.mkdir()
    forms = [
        "import erlangen.lm",
        "from erlangen import optim",
        "from erlangen.report.html import a",
        "from ..cli import b",
    ]
    path.write_text("\n".join([*forms, "from . import c"]))
    assert imports(path) == {"lm", "optim", "report", "cli", "gauge"}


def test_import_is_quick_and_light():
    """No heavy library comes in with the package; the time beyond torch is the benchmark's business (benchmarks/)."""
    code = (
        "import sys, erlangen as er\n"
        "er.finite, er.lm, er.breaking, er.gauge, er.lie, er.optim, er.testing, er.report\n"
        "heavy = {'transformers', 'matplotlib', 'datasets', 'heavyball', 'tensorboard', 'tiktoken', 'tokenizers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
