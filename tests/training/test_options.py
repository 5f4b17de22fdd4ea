"""The command `python -m tinyldm.training`: its options, and numbers that are none."""
from pathlib import Path

import pytest

from tinyldm.cli.options import Parser
from tinyldm.errors import TinyldmError
from tinyldm.training import options, rates


def parse(*arguments):
    parser = Parser("train")
    options.add_shared(parser, steps=10, learning_rate=1e-4)
    options.add_diffusion(parser)
    options.add_output(parser, Path("out"))
    return parser.parse_args(arguments)


@pytest.mark.parametrize("arguments, said", [
    (["--learning-rate", "fast"], "expected a number above 0, not 'fast'"),
    (["--learning-rate", "0"], "expected a number above 0, not '0'"),
    (["--learning-rate", "-0.1"], "expected a number above 0, not '-0.1'"),
    (["--learning-rate", "nan"], "expected a number above 0, not 'nan'"),
    (["--learning-rate", "inf"], "expected a number above 0, not 'inf'"),
    (["--steps", "0"], "expected a whole number from 1 to 1000000000, not '0'"),
    (["--batch", "2.5"], "expected a whole number from 1 to 10000, not '2.5'"),
    (["--accumulate", "0"], "expected a whole number from 1 to 10000, not '0'"),
    (["--clip", "-1"], "expected a number from 0, not '-1'"),
    (["--learning-rate", "-1e-4"], "expected a number above 0, not '-1e-4'"),
    (["--min-snr", "-5"], "expected a number from 0, not '-5'"),
    (["--ema", "1"], "expected a number from 0 and below 1, not '1'"),
    (["--betas", "0.9", "1"], "expected a number from 0 and below 1, not '1'"),
    (["--save-every", "-1"], "expected a whole number from 0"),
    (["--schedule", "cosin"], "invalid choice: 'cosin'"),
    (["--timesteps", "normal"], "invalid choice: 'normal'"),
    (["--rules", "1:10"], "such as 1:10,0.1:20,0.01, not '1:10'"),
    (["--resume", "always"], "invalid choice: 'always'"),
])
def test_numbers_that_make_no_training(arguments, said):
    with pytest.raises(TinyldmError) as error:
        parse(*arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_0_switches_off_where_that_is_usual():
    for name in ("clip", "min-snr", "ema", "noise-offset", "weight-decay", "warmup", "save-every",
                 "sample-every", "validate-every"):
        assert getattr(parse(f"--{name}", "0"), name.replace("-", "_")) == 0


@pytest.mark.parametrize("stage", ["vae", "unet", "decoder", "export", "restore", "evaluate"])
def test_the_recipes_old_command_names_the_new_one(stage):
    with pytest.raises(TinyldmError, match=f"python -m tinyldm.shapes {stage} --run x$"):
        options.parse([stage, "--run", "x"])


def test_the_loop_that_the_options_ask_for(tmp_path, monkeypatch):
    made = {}
    monkeypatch.setattr(options, "Trainer", lambda *found, **more: made.update(more, found=found))
    told = parse("--schedule", "cosine_with_restarts", "--cycles", "3", "--betas", "0.8", "0.95",
                 "--ema", "0.99", "--ema-form", "warmup", "--clip", "0", "--accumulate", "4",
                 "--save-every", "7", "--output", str(tmp_path))
    options.trainer(told, [], data="d", settings={"--rank": 4})
    path, _, steps, rate, warmup, optimizer = made["found"]
    assert (path, steps, rate, warmup) == (tmp_path / "state.npz", 10, 1e-4, 0)
    assert optimizer.keywords["beta1"] == 0.8 and optimizer.keywords["clip"] == 0
    assert optimizer.keywords["ema"](10 ** 9) == 0.99
    assert made["accumulation"] == 4 and made["save_every"] == 7 and made["data"] == "d"
    assert made["schedule"](5, 1.0, 0, 10) == rates.cosine_with_restarts(5, 1.0, 0, 10, cycles=3)
    assert made["settings"]["--rank"] == 4 and made["settings"]["--steps"] == 10
    options.trainer(parse(), [])                        # constant: --steps may grow
    assert "--steps" not in made["settings"]
    assert made["resume"] is False
