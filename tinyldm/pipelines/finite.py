"""The finite check: where NaN or infinity began, as the step and the first layer to produce it.

Used by the pipeline on what it encodes, samples and decodes, and by training (bad_layer).
"""
from contextlib import contextmanager
from functools import partial

from ..backend import is_finite
from ..errors import TinyldmError
from ..layers import SHARD, Parameter, forward_hooks, named_modules


def finite_states(states, predict):
    """Pass on a sampler's states; raise TinyldmError once their latents are not finite."""
    for state in states:
        check_output(state.latents, f"the latents became NaN or infinite at step {state.step + 1} "
                     f"(timestep {state.timestep:g})",
                     predict.unet, lambda: predict.unet(**predict.inputs))
        yield state


def check_output(output, message, module, run):
    """Raise TinyldmError for an output that is not finite: the message, then the first bad layer.

    run: runs the module again.
    """
    if not is_finite(output):
        raise TinyldmError(f"{message}: {first_bad_layer(module, run)}")


def first_bad_layer(module, run):
    """Run a module again -> a phrase that names the first bad layer."""
    name, _ = bad_layer({"": module}, run)
    if not name:
        return "no layer is to blame, so lower guidance_scale or use another sampler"
    return (f"the first layer to produce it is {name} of {type(module).__name__}: "
            "check the weights, or use dtype float32")


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
          _backward_hooks({layer: partial(checked, layer, "gradient") for layer in layers})):
        run()
    return found[min(found)] if found else (None, None)


@contextmanager
def _backward_hooks(hooks):
    """Inside, layer.backward(...) of a layer in {layer: hook} is hook(its backward, ...)."""
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
