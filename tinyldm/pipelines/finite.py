"""The finite check: where NaN or infinity began, as the step and the first layer to produce it.

Used by the pipeline on what it encodes, samples and decodes.
"""
from ..backend import is_finite
from ..bad_layer import bad_layer
from ..errors import TinyldmError


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
