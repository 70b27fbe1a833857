"""Who may import whom, read from the source; and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)
BASICS = {"plm.layers", "plm.packing", "plm.tokens", "plm.vocabularies", "plm.cache", "plm.outline"}
VERBS = {
    "plm.generation",
    "plm.prompts",
    "plm.writing",
    "plm.decoding",
    "plm.beams",
    "plm.sampling",
    "plm.graphs",
    "plm.recording",
    "plm.encoder_graphs",
    "plm.invariance",
    "plm.memory",
    "plm.scoring",
    "plm.variant_effects",
    "plm.prefix",
    "plm.embedding",
    "plm.annotation",
    "plm.context",
    "plm.contact_maps",
    "plm.folding",
    "plm.structures",
    "plm.mmcif",
    "plm.conversion",
    "plm.verification",
    "plm.processor",
    "plm.running",
    "plm.plots",
}
FILES = {"plm.sequences", "plm.outputs", "plm.mutations", "plm.terms"}
PEERS = {"transformers", "esm", "tensorflow", "proteinbert"}
OPTIONAL = ["h5py", "pyarrow", "matplotlib", *sorted(PEERS), "einops.layers"]

# The first prefix that fits a module says what of ours and of others it may import.
ALLOWED: dict[str, set[str]] = {
    "plm_kernels.gpu": {"torch", "triton", "plm_kernels"},
    "plm_kernels": {"torch", "plm_kernels"},
    "plm_weights": {"torch", "safetensors", "einops", "huggingface_hub", "plm_weights"},
    "plm.layers": {"torch", "plm_kernels"},
    "plm.packing": {"torch"},
    "plm.cache": {"torch", "plm_kernels", "plm.packing"},
    "plm.tokens": {"torch", "plm.packing"},
    "plm.vocabularies": {"plm.tokens"},
    "plm.models": {"torch", "plm_kernels", *BASICS},
    "plm.esmfold": {"torch", "einops", "plm_kernels", "plm.esmfold", *BASICS},
    "plm.models.proteinbert_heads": {"torch", "plm.models.proteinbert"},
    "plm.sequences": {"plm.sequences"},
    "plm.mutations": {"plm.sequences"},
    "plm.terms": {"plm.sequences"},
    "plm.outputs": {"torch", "numpy", "safetensors", "h5py", "pyarrow", "plm.outputs"},
    "plm.sampling": {"torch"},
    "plm.decoding": {"torch", "plm.sampling", *BASICS},
    "plm.beams": {"torch", "plm.models.t5", "plm.decoding", "plm.sampling", *BASICS},
    "plm.memory": {"torch"},
    "plm.recording": {"torch"},
    "plm.graphs": {"torch", "plm_kernels", "plm.models.progen2", "plm.recording", *BASICS},
    "plm.encoder_graphs": {"torch", "plm_kernels", "plm.models", "plm.recording", *BASICS},
    "plm.families": {"torch", "plm_weights", "plm.models", "plm.esmfold", *BASICS},
    "plm.processor": {"torch"},
    "plm.placement": {"torch", "plm.families", "plm.processor"},
    "plm.invariance": {"torch", "plm_kernels"},
    "plm.origins": {"plm_weights"},
    "plm.loading": {
        *("torch", "plm_weights", "plm_kernels", "plm.families", "plm.models", "plm.placement", "plm.processor"),
        *("plm.origins", "plm.encoder_graphs", "plm.invariance", "plm.graphs", "plm.recording"),
        *BASICS,
    },
    "plm.outline": {"torch"},
    "plm.previews": {"torch", "plm_weights", "plm.families", "plm.loading", "plm.outline"},
    "plm.conversion": {"torch", "plm_weights", "plm.models", "plm.families", "plm.loading", "plm.placement", *BASICS},
    "plm.peers": {"torch", "plm_weights", "plm.families", "plm.loading", "plm.models", "plm.esmfold", *BASICS, *PEERS},
    "plm.verification": {
        *("torch", "plm_weights", "plm.loading", "plm.peers", "plm.scoring", "plm.esmfold", "plm.folding"),
        *BASICS,
    },
    "plm.running": {"torch", "plm_kernels", "plm.loading", "plm.models", "plm.esmfold", "plm.sequences", *BASICS},
    "plm.prefix": {"torch", "plm_kernels", "plm.loading", "plm.models", "plm.running", *BASICS},
    "plm.mmcif": {"plm.esmfold", "plm.structures"},
    "plm.structures": {"torch", "plm.esmfold", "plm.mmcif"},
    "plm.ranks": {"numpy"},
    "plm.plots": {"numpy", "matplotlib", "torch"},
    "plm.report": {"numpy", "plm.plots"},
    "plm.cli": {"click", "tqdm", "torch", "huggingface_hub", "plm_weights", "plm_kernels", "plm"},
    "plm.__main__": {"plm.cli"},
    "plm": {"torch", "plm_kernels", "plm_weights", "plm.loading", "plm.models", "plm.esmfold", *BASICS, *VERBS, *FILES},
}


def modules() -> dict[str, Path]:
    found = {}
    for root in (ROOT, ROOT / "kernels", ROOT / "weights"):
        for package in ("plm", "plm_kernels", "plm_weights"):
            for path in sorted((root / package).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write whole names, not relative imports"
            names |= {node.module or ""} | {
                f"{node.module}.{alias.name}" for alias in node.names if node.module == "plm"
            }
    return {name for name in names if name.split(".")[0] not in STANDARD}


def violations(module: str, names: set[str]) -> list[str]:
    layer = next(
        prefix for prefix in (*sorted(ALLOWED, key=len, reverse=True),) if f"{module}.".startswith(f"{prefix}.")
    )
    allowed = ALLOWED[layer]
    return [
        f"{module} must not import {name}"
        for name in sorted(names)
        if not any(f"{name}.".startswith(f"{good}.") for good in allowed) and name != "plm"
    ]


def test_nothing_imports_upward() -> None:
    found = modules()
    assert {"plm.models.esm", "plm_kernels.rotary", "plm_weights.keymap"} < found.keys()
    assert [fault for module, path in found.items() for fault in violations(module, imported(path))] == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("plm_kernels.rotary", "plm.layers"),
        ("plm_weights.esm", "plm.models.esm"),
        ("plm.models.esm", "plm.loading"),
        ("plm.models.proteinbert", "plm.models.proteinbert_heads"),
        ("plm.embedding", "plm.cli"),
    ],
)
def test_an_upward_import_would_be_seen(module: str, name: str) -> None:
    assert violations(module, {name}) == [f"{module} must not import {name}"]


def test_importing_plm_imports_nothing_heavy() -> None:
    """`import plm` loads no torch, no numpy; and `plm.load` none of the optional libraries."""
    code = (
        "import sys, plm\n"
        "assert 'torch' not in sys.modules\n"
        "plm.load, plm.embed\n"
        f"print([name for name in {OPTIONAL} if name in sys.modules])"
    )
    path = ":".join(map(str, (ROOT, ROOT / "kernels", ROOT / "weights")))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_loading_imports_no_compiler(random_8m: Path) -> None:
    """Some operations on the device ``meta`` make torch import it: a second before the first embedding."""
    code = f"import sys, plm; plm.load({str(random_8m)!r}); print(*{{'torch._dynamo', 'sympy'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
