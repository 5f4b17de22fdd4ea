"""Which layer was the first to produce NaN or infinity: asked by pipelines/finite.py and training/.
"""
from contextlib import contextmanager
from functools import partial

from .backend import is_finite
from .layers import SHARD, Parameter, forward_hooks, named_modules


def bad_layer(modules, run):
    """Run modules again with a check around every layer -> the first bad one's name, and "output"
    or "gradient"; None and None if there is none.

    That is the innermost layer whose inputs are finite and whose output is not; or, in a backward,
    whose output is not, or its own parameters' gradients. modules: {prefix: module}. run: runs them
    forward, or forward and backward. Of the shards of a batch, the first bad one counts.
    """
    layers, found = {}, {}
    for prefix, module in modules.items():
        for name, layer in named_modules(module):
            layers.setdefault(layer, f"{prefix}.{name}" if prefix else name)

    def checked(layer, what, call, *inputs, **options):
        clean = _all_finite([*inputs, *options.values()])
        output = call(*inputs, **options)
        own = [value.grad for value in vars(layer).values() if isinstance(value, Parameter)
               ] if what == "gradient" else []
        if clean and not _all_finite([output, *own]):
            found.setdefault(SHARD.get(), (layers[layer], what))
        return output

    with (forward_hooks({layer: partial(checked, layer, "output") for layer in layers}),
          backward_hooks({layer: partial(checked, layer, "gradient") for layer in layers})):
        run()
    return found[min(found)] if found else (None, None)


@contextmanager
def backward_hooks(hooks):
    """Inside, layer.backward(...) of a layer in {layer: hook} is hook(its backward, ...). The
    profiler uses it, too."""
    try:
        for layer, hook in hooks.items():
            if hasattr(layer, "backward"):
                layer.backward = partial(hook, layer.backward)
        yield
    finally:
        for layer in hooks:
            vars(layer).pop("backward", None)


def _all_finite(values):
    """Check arrays, also in lists such as the UNet's skips; other values pass."""
    return all(_all_finite(value.values() if isinstance(value, dict) else value)
               if isinstance(value, (list, tuple, dict))
               else is_finite(value) if hasattr(value, "dtype") else True for value in values)
