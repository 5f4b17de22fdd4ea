"""What a progress bar counts, and the bar of a notebook. Elsewhere callers of `stream` show one."""
import sys
import warnings


def with_bar(states, steps):
    """Pass on a stream's states; in a notebook with a bar of `steps` steps."""
    if "ipykernel" not in sys.modules:
        yield from states
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # without ipywidgets the bar is text
        from tqdm.auto import tqdm

        bar = tqdm(desc="drawing", total=steps, unit="step")
    yield from counted(states, bar)


def counted(states, bar):
    """Pass on a stream's states; a tqdm bar counts the steps, not all calls of the model."""
    with bar:
        for state in states:
            yield state
            bar.update(not state.repeats)
