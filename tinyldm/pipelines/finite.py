"""The finite check: where NaN or infinity began, as the step and the first layer to produce it.

Used by the pipeline on what it encodes, samples and decodes.
"""
from ..backend import is_finite
from ..errors import TinyldmError
from ..layers import forward_hooks, named_modules


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
    """Run a module again with a hook on every layer -> a phrase that names the first bad one.

    That is the innermost layer whose inputs are finite and whose output is not.
    """
    culprits = []

    def check(name):
        def checked(forward, *inputs, **options):
            clean = _all_finite([*inputs, *options.values()])
            output = forward(*inputs, **options)
            if clean and not culprits and not is_finite(output):
                culprits.append(name)
            return output
        return checked

    with forward_hooks({layer: check(name) for name, layer in named_modules(module)}):
        run()
    if not culprits:
        return "no layer is to blame, so lower guidance_scale or use another sampler"
    return (f"the first layer to produce it is {culprits[0]} of {type(module).__name__}: "
            "check the weights, or use dtype float32")


def _all_finite(values):
    """Check arrays, also in lists such as the UNet's skips; other values pass."""
    return all(_all_finite(value) if isinstance(value, (list, tuple))
               else is_finite(value) if hasattr(value, "dtype") else True for value in values)
