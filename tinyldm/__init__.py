"""tinyldm: a latent diffusion model by hand, on NumPy.

    pipe = tinyldm.load()                       # the bundled model, a folder, or a name on the hub
    pipe("a big red circle on a blue background")[0].save("out.png")

The bundled model knows one language, and nothing else:

    a {small|big} {colour} {shape} [{above|below|left of|right of} a {small|big} {colour} {shape}]
    on a {colour} background

    colour: red, green, blue, yellow, orange, purple, white, black, pink, gray
    shape: circle, square, triangle, star, heart, ring, cross, diamond

For all else load Stable Diffusion, such as load("stable-diffusion-v1-5/stable-diffusion-v1-5").

Public names only. Each is imported when it is first used, so that `import tinyldm` is instant.
"""
import importlib

TYPE_CHECKING = False                   # editors and type checkers take it as true
if TYPE_CHECKING:
    from . import noise as noise
    from .checkpoints import load_model as load_model
    from .checkpoints import save as save
    from .errors import TinyldmError as TinyldmError
    from .images import to_pil as to_pil
    from .pipelines.interpolation import Between as Between
    from .pipelines.loading import load as load
    from .pipelines.stable_diffusion import StableDiffusion as StableDiffusion
    from .xray.attention import attention_maps as attention_maps
    from .xray.record import xray as xray

__version__ = "0.1.0"
__all__ = ["Between", "StableDiffusion", "TinyldmError", "attention_maps", "load", "load_model",
           "noise", "save", "to_pil", "xray"]

_HOMES = {"Between": "pipelines.interpolation",
          "StableDiffusion": "pipelines.stable_diffusion", "TinyldmError": "errors",
          "attention_maps": "xray.attention", "load": "pipelines.loading",
          "load_model": "checkpoints", "save": "checkpoints", "to_pil": "images"}


def _get(name):
    if name in ("noise", "xray"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'tinyldm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


if not TYPE_CHECKING:                   # so that they find a misspelt name
    __getattr__ = _get


def __dir__():
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
