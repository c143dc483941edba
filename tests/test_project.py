"""Facts about the project itself that must not rot."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import embcomp

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# What `import embcomp` may not need: each is heavy, optional, or fails to import on a machine it was not built for.
HEAVY = ["torchrec", "fbgemm_gpu", "tensordict", "pandas", "pyarrow", "hydra", "omegaconf", "sklearn", "plotly"]
HEAVY += ["onnx", "onnxruntime", "onnxscript"]


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def requirements() -> list[Requirement]:
    texts = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    return [r for r in map(Requirement, texts) if canonicalize_name(r.name) != PROJECT["name"]]


def project_files() -> list[Path]:
    """Every file that is in the repository or about to be."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, or no git: nothing lists the project's files")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_version_is_the_same_in_pyproject_and_package():
    assert embcomp.__version__ == PROJECT["version"]


def test_every_requirement_is_pinned_to_a_version_it_allows():
    pinned = pins()
    wrong = [str(r) for r in requirements() if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"))]
    assert not wrong, f"add a fitting pin to requirements/constraints.txt for: {wrong}"


def test_plain_install_names_neither_torchrec_nor_fbgemm():
    """TorchRec's metadata would bring the CUDA build of fbgemm to a CPU machine, where it fails to import."""
    plain = [*PROJECT["dependencies"], *(text for name in ("models", "bench", "dev") for text in EXTRAS[name])]
    assert not [text for text in plain if re.match(r"torchrec|fbgemm", text)]
    assert not [text for text in EXTRAS["torchrec"] if re.match(r"torchrec|fbgemm-gpu(?!-cpu)", text)]


def test_no_file_names_a_path_of_somebodys_machine():
    local = re.compile(rb"(?<![\w./~$})-])/(?:work|opt|root|home|Users)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace').strip()}"
        for path in project_files()
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if local.search(line)
    ]
    assert not found, "\n".join(found)


def test_configs_are_a_package_so_that_hydra_finds_them_in_an_installed_wheel():
    assert (ROOT / "configs" / "__init__.py").is_file()


@pytest.mark.parametrize("form", ["configs/strategy/{}.yaml", "tests/strategies/test_{}.py"])
def test_every_strategy_has(form: str):
    missing = [form.format(name) for name in embcomp.list_strategies() if not (ROOT / form.format(name)).is_file()]
    assert not missing, f"a registered strategy needs: {missing}"


def test_import_pulls_in_no_heavy_package_and_opens_no_connection():
    code = f"""
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError(f"import embcomp used the network: {{args}}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
import embcomp
loaded = [name for name in {HEAVY} if name in sys.modules]
sys.exit(f"import embcomp imported {{loaded}}" if loaded else 0)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_import_works_where_only_torch_numpy_and_safetensors_are_installed():
    absent = dict.fromkeys([*HEAVY, "scipy"])  # None in sys.modules makes an import fail
    code = f"import sys; sys.modules.update({absent}); import embcomp; embcomp.list_strategies()"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
