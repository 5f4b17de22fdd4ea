"""What a progress bar counts, and the bar of a notebook. Elsewhere callers of `stream` show one."""
import sys
import warnings


def with_bar(states, sampler, steps, made):
    """Pass on a stream's states; in a notebook with a bar of `made` of the `steps`."""
    if "ipykernel" not in sys.modules:
        yield from states
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # without ipywidgets the bar is text
        from tqdm.auto import tqdm

        bar = tqdm(desc="drawing", total=made, unit="step")
    yield from counted(states, bar, sampler, steps, made)


def counted(states, bar, sampler, steps, made):
    """Pass on a stream's states; a tqdm bar counts the steps that are made. See second_calls."""
    again = second_calls(sampler, steps, made)
    with bar:
        for state in states:
            yield state
            bar.update(state.step not in again)


def second_calls(name, steps, made):
    """Which of a sampler's model calls, counted from 0, repeat a step: progress leaves them out.

    steps: of the whole trajectory. made: those that are made, fewer for a picture to begin from.
    PNDM calls the model twice in its first step, Heun in all steps except the last.
    """
    again = {"pndm": range(steps > 1), "heun": range(1, 2 * made, 2)}
    return again.get(name.partition("_")[0], ())
