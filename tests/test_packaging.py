"""The distribution: packages, versions, pins, the built wheel, and which imports are allowed."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import corollary

ROOT = Path(corollary.__file__).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["optional-dependencies"].items()}
DEVELOPMENT = {"bench", "dev", "docs", "notebooks"}  # extras that the library itself never imports
IMPORT_NAMES = {
    "imageio-ffmpeg": "imageio_ffmpeg",
    "open-spiel": "pyspiel",
    "pillow": "PIL",
    "stable-baselines3": "stable_baselines3",
    "torch-geometric": "torch_geometric",
}
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
NOT_NEEDED = shutil.ignore_patterns(".*", "build", "dist", "runs", "__pycache__", "*.egg-info")

# Imports each module named on the command line in a child of its own (so that no module relies on another having been
# imported before), with the folder first on the path and the blocked packages absent; prints what went wrong.
IMPORT_EACH = """
import importlib, json, os, sys, traceback
folder, blocked, modules = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, folder)
sys.modules.update(dict.fromkeys(blocked))
import gymnasium, h5py, matplotlib.pyplot, rich.console, scipy.spatial, torch  # once, for all children
failed = []
for module in modules:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            origin = importlib.import_module(module).__file__
            assert origin.startswith(folder), f"{module} came from {origin}"
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(module)
print(json.dumps(failed))
"""


def package_folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def module_files(package: str = "corollary") -> dict[str, Path]:
    """The modules of the packages below `package`, as the folders of the checkout hold them."""
    files = {}
    for name in PACKAGES:
        if name == package or name.startswith(f"{package}."):
            for path in package_folder(name).glob("*.py"):
                files[name if path.stem == "__init__" else f"{name}.{path.stem}"] = path
    return files


def import_name(requirement: Requirement) -> str:
    name = canonicalize_name(requirement.name)
    return IMPORT_NAMES.get(name, name)


def imported(path: Path) -> Iterator[str]:
    """The top-level names of every absolute import in a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module.split(".")[0]


def third_party(package: str) -> set[str]:
    names = {name for path in module_files(package).values() for name in imported(path)}
    return names - sys.stdlib_module_names - {"corollary"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_NEEDED)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"],
        check=True,
        capture_output=True,
    )
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as contents:
        contents.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_explicit_package_list_equals_the_folders():
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    folders = {path.parent for room in rooms for path in room.rglob("*.py")} | {ROOT}
    assert sorted(PACKAGES) == sorted(".".join(["corollary", *f.relative_to(ROOT).parts]) for f in folders)
    assert [f for f in folders if not (f / "__init__.py").exists()] == []


def test_every_statement_of_the_version_agrees():
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest_change = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation is not None
    assert newest_change is not None
    assert {citation[1], newest_change[1], corollary.__version__} == {PROJECT["version"]}


def test_constraints_pin_every_dependency_to_a_version_its_bound_allows():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = Version(version)
    named = [*REQUIRED, *(r for extra in EXTRAS.values() for r in extra if r.name != PROJECT["name"])]
    refused = [str(r) for r in named if pins.get(canonicalize_name(r.name), "0") not in r.specifier]
    assert refused == []
    assert [str(r) for r in named if not r.specifier] == []  # a bound is stated for each


def test_wheel_holds_the_modules_and_their_data_and_nothing_else(wheel: Path):
    shipped = {path.name for path in (ROOT / "core" / "shipped").iterdir()}
    assert "README.md" in shipped
    assert any(name.endswith(".hdf5") for name in shipped)
    expected = {
        "corollary/py.typed",
        "corollary/theory_checks/tightest.json",
        *(f"corollary/core/shipped/{name}" for name in shipped),
        *(f"corollary/{path.relative_to(ROOT)}" for path in module_files().values()),
    }
    present = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in present if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("optional", ["installed", "absent"])
def test_wheel_imports_every_module(wheel: Path, optional: str):
    extras = [r for extra, lines in EXTRAS.items() if extra not in DEVELOPMENT for r in lines]
    blocked = [import_name(r) for r in extras] if optional == "absent" else []
    modules = sorted(module_files())
    result = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT_EACH, str(wheel), json.dumps(blocked), json.dumps(modules)],
        check=True,
        capture_output=True,
        text=True,
    )
    # Kernels written in Triton or Numba are modules imported when they are used; here they show that blocking works.
    missing = [each for each in ("triton", "numba") if each in blocked or importlib.util.find_spec(each) is None]
    expected = [module for module in modules if module.endswith(tuple(f"_{each}" for each in missing))]
    assert json.loads(result.stdout) == expected, result.stderr


def test_kernels_import_numerics_only():
    assert third_party("corollary.kernels") <= {"torch", "numpy", "scipy", "triton", "numba"}


def test_what_is_imported_is_declared_and_what_is_required_is_imported():
    required = {import_name(r) for r in REQUIRED}
    extras = {import_name(r) for extra, lines in EXTRAS.items() if extra not in DEVELOPMENT for r in lines}
    assert third_party("corollary") <= required | extras | {"mujoco"}  # mujoco comes with gymnasium[mujoco]
    assert required <= third_party("corollary")


def lint_imports(source: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contract of the package at `source`, a folder called corollary."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache", "--config", "pyproject.toml"],
        cwd=source,
        env={"PYTHONPATH": str(source.parent), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_import_contract_holds_and_catches_each_forbidden_direction(tmp_path: Path):
    source = tmp_path / "corollary"
    shutil.copytree(ROOT, source, ignore=NOT_NEEDED)
    kept = lint_imports(source)
    assert kept.returncode == 0, kept.stdout + kept.stderr

    (source / "online" / "objectives.py").touch()
    forbidden = {
        "kernels": "core",
        "core": "offline",
        "offline": "online",
        "online": "bandits",
        "games": "online",
        "bandits": "offline",
        "theory_checks": "cli",
    }
    for importer, target in forbidden.items():
        (source / importer / "_upwards.py").write_text(f"import corollary.{target}\n")
    (source / "bandits" / "_allowed.py").write_text("import corollary.online.objectives\n")
    (source / "bandits" / "_beside.py").write_text("import corollary.online\n")
    broken = lint_imports(source)
    assert broken.returncode == 1
    for importer, target in forbidden.items():
        assert f"corollary.{importer}._upwards -> corollary.{target} (l.1)" in broken.stdout
    assert "corollary.bandits._beside -> corollary.online (l.1)" in broken.stdout
    assert "_allowed" not in broken.stdout
