"""Imports point one way, and the mathematics needs NumPy alone: read from the source."""
import ast
import subprocess
import sys

import pytest

import tinyldm
from tests.support.sources import PACKAGE, SOURCES
from tinyldm.pipelines.loading import load
from tinyldm.pipelines.stable_diffusion import StableDiffusion

# What a room may import besides itself: cli → pipelines → models, diffusion, text, checkpoints →
# layers → ops → kernels → backend. The programs' entry points may import all.
BOTTOM = {"errors", "files", "backend", "configs", "signals", "ranks"}
MAY_IMPORT = {
    "errors": set(),
    "signals": set(),
    "ranks": {"errors", "backend"},
    "files": {"errors"},
    "configs": {"errors"},
    "backend": {"errors", "ranks"},
    "noise": {"errors"},
    "images": BOTTOM,
    "image_processor": BOTTOM | {"images"},
    "kernels": BOTTOM,
    "ops": BOTTOM | {"kernels"},
    "tape": set(),
    "module": BOTTOM | {"tape"},
    "layers": BOTTOM | {"ops", "tape", "module"},
    "bad_layer": BOTTOM | {"layers"},
    "models": BOTTOM | {"ops", "layers"},
    "diffusion": BOTTOM | {"ops"},
    "text": BOTTOM,
    "checkpoints": BOTTOM | {"kernels", "layers", "models"},
    "pipelines": BOTTOM | {"noise", "images", "image_processor", "ops", "layers", "bad_layer",
                           "models", "diffusion", "text", "checkpoints"},
    "cli": BOTTOM | {"__version__", "noise", "images", "text", "layers", "bad_layer", "models",
                     "checkpoints", "pipelines"},
    "inspect": BOTTOM | {"checkpoints", "cli", "images", "layers", "models"},
    "metrics": BOTTOM | {"images", "image_processor", "ops", "layers", "models", "text",
                         "checkpoints", "pipelines", "cli"},
    "training": BOTTOM | {"tape", "noise", "images", "image_processor", "ops", "layers",
                          "bad_layer", "models", "diffusion", "text", "checkpoints", "pipelines",
                          "cli"},
    "shapes": BOTTOM | {"noise", "images", "ops", "layers", "models", "diffusion", "text",
                        "checkpoints", "pipelines", "training", "metrics", "cli"},
    "xray": BOTTOM | {"__version__", "noise", "images", "ops", "layers", "bad_layer", "models",
                      "diffusion", "text", "checkpoints", "pipelines", "shapes", "cli"},
}
ENTRY_POINTS = {"__init__.py", "__main__.py"}
# Besides the standard library. CuPy is asked for by backend, and used by the kernels made for it.
LIBRARIES = {"numpy", "tokenizers", "safetensors", "threadpoolctl", "huggingface_hub",
             "PIL", "tqdm", "matplotlib", "tensorboard", "mpi4py"}


def imports(file, source):
    """Every module imported anywhere in a file, inside functions too, by its full dotted name."""
    package = ["tinyldm", *file.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[:len(package) - node.level + 1] + [node.module or ""]
            yield from (".".join(filter(None, [*parent, alias.name])) for alias in node.names)


def violations(file, source):
    part = file.split("/")[0].removesuffix(".py")
    found = []
    for name in imports(file, source):
        top, *rest = name.split(".")
        if top == "tinyldm":
            target = rest[0] if rest else "the package itself"
            allowed = file in ENTRY_POINTS or target == part or target in MAY_IMPORT[part]
        else:
            allowed = (top in LIBRARIES or top in sys.stdlib_module_names
                       or top == "cupy" and part in ("backend", "kernels"))
        if not allowed:
            found.append(f"{file} imports {name}")
    return found


@pytest.mark.parametrize("file", SOURCES)
def test_imports_point_one_way(file):
    assert file in ENTRY_POINTS or file.split("/")[0].removesuffix(".py") in MAY_IMPORT, (
        f"{file} is new: give it a place in MAY_IMPORT")
    assert not violations(file, (PACKAGE / file).read_text(encoding="utf-8"))


def test_the_judge_shares_no_code_with_what_it_judges():
    """It measures pictures by itself, or a mistake in drawing would go unseen."""
    names = imports("shapes/judge.py", (PACKAGE / "shapes/judge.py").read_text(encoding="utf-8"))
    assert {name for name in names if name.startswith("tinyldm")} == {"tinyldm.errors.TinyldmError"}


@pytest.mark.parametrize("file, source", [
    ("ops/norm.py", "from ..layers import Tape"), ("ops/norm.py", "from .. import layers"),
    ("ops/norm.py", "def f():\n    import tinyldm.models.unet"),
    ("models/vae.py", "import torch.nn"), ("noise.py", "from scipy.stats import norm"),
    ("models/unet.py", "from ..pipelines import load"), ("layers.py", "from .models import clip"),
    ("layers.py", "from tinyldm import pipelines"),
    ("diffusion/samplers/ddim.py", "from ...models import clip"),
    ("training/loop.py", "from ..shapes import scenes"),
    ("text/tokenizer.py", "from transformers import CLIPTokenizer"), ("layers.py", "import cupy"),
    ("pipelines/editing.py", "import diffusers"), ("backend.py", "import jax"),
])
def test_a_wrong_import_is_seen(file, source):
    assert violations(file, source)


# ---- the tests --------------------------------------------------------------------------------

TESTS = PACKAGE.parent / "tests"


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")),
                         ids=lambda file: file.relative_to(TESTS).as_posix())
def test_no_test_is_imported(file):
    """What several files use lies in tests/support, which imports no test either."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
        names += (getattr(node, "module", None) or "").split(".")
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not [name for name in names if name.rpartition(".")[2].startswith("test_")]


# ---- the public names -----------------------------------------------------------------------

def test_public_names():
    assert set(tinyldm.__all__) <= set(dir(tinyldm))
    for name in tinyldm.__all__:
        assert getattr(tinyldm, name)
    assert tinyldm.load is load and tinyldm.StableDiffusion is StableDiffusion
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert f'version = "{tinyldm.__version__}"' in project
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tinyldm.nothing  # noqa: B018


def test_importing_is_light():
    heavy = "{'PIL', 'tokenizers', 'safetensors', 'huggingface_hub', 'tqdm', 'threadpoolctl'}"
    code = (f"import sys, tinyldm; assert 'numpy' not in sys.modules; tinyldm.load; "
            f"tinyldm.noise.randn; assert not {heavy} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
