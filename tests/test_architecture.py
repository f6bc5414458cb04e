"""Imports go down only, and stay light: read off the source, and off a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vgpt_jax"

FLOORS = [  # from the ground up; a module imports from floors below its own, and from its own package on its own floor
    {"errors", "progress", "files", "host_memory", "imagenet", "hardware"},
    {"quantizers", "configuration", "command_line"},
    {"models", "losses", "evaluation.metrics", "visualization"},
    {"data", "sampling.logits", "sampling.guidance", "sampling.generate", "sampling.parallel", "sampling.request",
     "sampling.program", "sampling.class_names", "training.sharding", "training.optimizer", "training.from_config",
     "training.saved_model", "training.state", "training.checkpoint", "training.metric_log", "training.processes",
     "training.remat", "training.manifest", "training.preemption", "training.workdir_lock", "training.hlo",
     "training.compiled_cost", "training.speed", "training.trace", "training.compile_report"},
    {"sampling.completion", "sampling.cond_visual_gpt", "sampling.progressive", "sampling.record", "evaluation.runner",
     "evaluation.frechet",
     "pretrained", "training.diff_augment"},
    {"sampling.rerank", "training.stage", "training.tokenizer_step"},
    {"training.loop", "training.tokenizer_stage", "training.generator_stage", "training.classifier_stage"},
    {"evaluation.measure", "training.stages"},
    {"main", "sample", "evaluate", "convert", "prepare", "compile_ahead"},
    {"benchmarks"},
]  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def floor_of(name: str) -> int:
    parts = name.split(".")
    for floor, rooms in enumerate(FLOORS):
        if any(".".join(parts[: n + 1]) in rooms for n in range(len(parts))):
            return floor
    raise AssertionError(f"{name} has no place in the plan")


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vgpt_jax"):
            base = node.module.removeprefix("vgpt_jax").lstrip(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".lstrip(".")
                is_module = (PACKAGE / (deeper.replace(".", "/") + ".py")).is_file() or (
                    PACKAGE / deeper.replace(".", "/")
                ).is_dir()
                found.add(deeper if is_module else base)
    return found


FILES = {module_name(p): p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts != ("__init__.py",)}
MODULES = {
    name: path
    for name, path in FILES.items()
    if not (path.name == "__init__.py" and name in ("sampling", "training", "evaluation"))
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down_only(name):
    for other in imports(MODULES[name]):
        same_room = floor_of(other) == floor_of(name) and other.split(".")[0] == name.split(".")[0]
        assert floor_of(other) < floor_of(name) or same_room, f"{name} imports {other}"


def test_stages_do_not_know_each_other_and_the_loop_knows_no_stage():
    stages = {f"training.{s}_stage" for s in ("tokenizer", "generator", "classifier")}
    for name in stages | {"training.loop"}:
        assert not imports(MODULES[name]) & (stages - {name})
    assert not {m for m in imports(MODULES["training.loop"]) if m.startswith("models")}


def test_configs_import_configs_and_ml_collections_only():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert all(n.split(".")[0] in ("configs", "ml_collections") for n in names), path


@pytest.mark.parametrize(
    "statement",
    [
        "import vgpt_jax",
        "from vgpt_jax import CondVisualGPT, ClassConditionedRejectionSampler, VectorQuantize, Tokenizer, GPT",
        "import vgpt_jax.sample, vgpt_jax.convert, vgpt_jax.evaluate, vgpt_jax.prepare",
        "import vgpt_jax.training.tokenizer_stage, vgpt_jax.training.generator_stage, vgpt_jax.training.classifier_stage",
    ],
)
def test_neither_tensorflow_nor_torch_is_imported(statement):
    check = (
        f"import sys; {statement}; print([m for m in ('tensorflow', 'torch', 'matplotlib', 'clu') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", check], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_public_names_are_there_and_an_unknown_one_is_not():
    import vgpt_jax

    for name in vgpt_jax.__all__:
        assert getattr(vgpt_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="VectorQuantize"):
        vgpt_jax.VectorQuantise  # noqa: B018
