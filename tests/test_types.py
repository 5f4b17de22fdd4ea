"""What editors and type checkers know of tinyldm: a caller's file, read by mypy."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CALLER = '''import tinyldm

pipe = tinyldm.load()
pictures = pipe("a cat", num_inference_steps=3, seed=1, width=64)
pictures[0].save("out.png")
for state in pipe.stream("a cat", guidance_scale=4.0):
    print(state.step + 1, state.timestep, state.latents.shape)
pipe.unet = lambda x, t, c: x
tinyldm.to_pil(pipe.decode(state.latents))[0].size
tinyldm.noise.randn((1, 2), 3).sum()
'''


def check(text, folder):
    file = folder / "caller.py"
    file.write_text(text)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports",
               "--cache-dir", folder / "cache", file]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout


def test_the_lowest_python_has_what_is_imported(tmp_path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--python-version", "3.10", "--follow-imports=silent",
               "--ignore-missing-imports", "--cache-dir", tmp_path, "tinyldm"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    assert "source files" in said
    assert not [line for line in said.splitlines() if re.search('Module ".*" has no attr', line)]


def test_a_caller_is_clean_and_its_mistakes_are_found(tmp_path):
    pytest.importorskip("mypy")
    assert check(CALLER, tmp_path).startswith("Success")
    wrong = check(CALLER + 'pipe("a cat", widht=64)\npipe("a cat", width="x")\n'
                  'tinyldm.laod()\ntinyldm.load(low_memory="yes")\n', tmp_path)
    assert 'Unexpected keyword argument "widht"' in wrong and "Found 4 errors" in wrong
    assert 'has no attribute "laod"' in wrong and 'No overload variant of "load"' in wrong
    assert '"width" to "__call__" of "StableDiffusion" has incompatible type "str"' in wrong
