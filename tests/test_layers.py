"""Imports point one way, and torch alone is enough."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdsopt

PACKAGE = Path(sdsopt.__file__).parent

# Each part may import those before it, except where `NEVER` forbids it.
ORDER = [
    "printable",
    "errors",
    "options",
    "every_step",
    "extras",
    "_version",
    "linalg",
    "sharding",
    "pairs",
    "placements",
    "diagnostics",
    "adapters",
    "corrections",
    "lora_plus",
    "nesting",
    "weight_decay",
    "inner",
    "moments",
    "bypass",
    "engine",
    "hooks",
    "optimizer",
    "recorder",
    "constructors",
    "__init__",
    "integrations",
    "reference",
    "compare",
    "bench",
    "cli",
    "__main__",
]
OPTIMIZERS = {"nesting", "weight_decay", "inner", "moments", "bypass"}
NEVER = {
    "sharding": {"linalg"},
    "pairs": {"linalg"},
    "corrections": {"pairs", "sharding"},
    "engine": OPTIMIZERS,
    "hooks": OPTIMIZERS,
}
TORCH_ONLY = set(ORDER) - {"adapters", "integrations", "reference", "compare", "bench", "cli", "__main__"}
STANDARD = set(sys.stdlib_module_names) | {"torch"}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found.add(node.module or "")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_is_in_the_order() -> None:
    assert {part_of(file) for file in FILES} == set(ORDER)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    part = part_of(file)
    allowed = set(ORDER[: ORDER.index(part) + 1]) - NEVER.get(part, set())
    ours = [name for name in imports(file) if name.partition(".")[0] == "sdsopt"]
    used = {name.split(".")[1] if "." in name else "__init__" for name in ours}
    assert used <= allowed


@pytest.mark.parametrize("part", sorted(TORCH_ONLY))
def test_the_core_needs_torch_alone(part: str) -> None:
    files = [file for file in FILES if part_of(file) == part]
    assert files
    others = {name.partition(".")[0] for file in files for name in imports(file)} - STANDARD - {"sdsopt"}
    assert not others


def test_one_file_touches_gradients() -> None:
    texts = {file: file.read_text(encoding="utf8") for file in FILES}
    users = {part_of(file) for file, text in texts.items() if any(use in text for use in (".grad ", ".grad\n"))}
    assert users == {"engine"}


def test_one_part_communicates() -> None:
    users = {part_of(file) for file in FILES for name in imports(file) if name.startswith("torch.distributed")}
    assert users == {"sharding", "placements"}  # the second for a type


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# None in sys.modules makes an import of that name fail.
WITHOUT = """
import sys
for name in ("peft", "transformers", "accelerate", "numpy", "sklearn"):
    sys.modules[name] = None
for name in ("matplotlib", "rich", "rich_argparse", "safetensors", "shtab"):
    sys.modules[name] = None
"""


def test_public_names_without_any_extra() -> None:
    run = run_python(
        WITHOUT
        + """
import torch
from sdsopt import SDSPreconditioner, find_pairs, LoRAPair, Correction
print(len(find_pairs(torch.nn.Linear(2, 2))))
"""
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "0\n"


def test_the_command_without_its_extra_says_what_to_install() -> None:
    run = run_python(WITHOUT + "from sdsopt.cli import main; sys.exit(main(['compare', '--out', '/nonexistent']))")
    assert run.returncode == 1
    assert "pip install 'sdsopt[demo]'" in run.stderr
    assert "Traceback" not in run.stderr


def test_adapters_without_the_extra_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"")
    command = ["inspect", str(tmp_path / "lora.safetensors")]
    run = run_python(f"{WITHOUT}from sdsopt.cli import main; sys.exit(main({command!r}))")
    assert run.returncode == 1
    assert run.stderr.endswith(
        "sdsopt: error: this needs safetensors, which is not installed: pip install 'sdsopt[cli]'\n"
    )
    assert "Traceback" not in run.stderr


def test_importing_the_package_imports_no_harness() -> None:
    others = ("sdsopt.adapters", "sdsopt.compare", "peft")
    run = run_python(f"import sys, sdsopt; print([m for m in sys.modules if m.startswith({others})])")
    assert run.stdout == "[]\n", run.stderr


def test_every_public_name_is_documented() -> None:
    for name in sdsopt.__all__:
        if name != "__version__":
            assert getattr(sdsopt, name).__doc__, name
