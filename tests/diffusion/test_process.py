"""The chain in float64: published schedules, the posterior, respacing, timesteps for the model."""
import numpy as np
import pytest

from tests.support.tolerance import assert_allclose
from tinyldm.diffusion.process import Process, kept_timesteps
from tinyldm.diffusion.schedule import Schedule
from tinyldm.errors import TinyldmError

# Of the public code: beta and alpha_bar at 0, T/2, T-2, T-1; None: not published.
PUBLISHED = [
    (Process.cosine(1000), (4.128422482196914e-05, .003155691441585007, .7499993929, .999),
     (.999958715775178, .492285172448803, 2.4287669e-6, 2.4287669e-9)),
    (Process.cosine(4000), (9.865818813681315e-06, .0007889355535504, .749999962056, .999),
     (.999990134181186, .493453979674264, 1.5179805e-7, 1.5179805e-10)),
    (Process.linear(1000), (1e-4, None, None, .02),
     (.9999, .07779665836502389, None, 4.035829765375676e-05)),
    (Process.linear(4000), (2.5e-5, None, None, .005),
     (None, .07874647522425243, None, 4.246652275802249e-05)),
]


@pytest.mark.parametrize("process, betas, alpha_bars", PUBLISHED)
def test_published_schedules(process, betas, alpha_bars):
    T = process.num_train_timesteps
    for table, published in ((process.betas, betas), (process.alphas_cumprod, alpha_bars)):
        assert table.dtype == np.float64
        for t, number in zip((0, T // 2, T - 2, T - 1), published):
            if number is not None:
                digits = len(str(number).split("e")[0].replace(".", "").strip("0"))
                assert_allclose(table[t], number, rtol=max(5 * 0.1 ** digits, 1e-9), what=str(t))


@pytest.mark.parametrize("T", [1000, 4000])
def test_cosine_clips_the_last_step_only(T):
    betas = Process.cosine(T).betas
    assert betas[-1] == 0.999 and (betas[:-1] < 0.76).all()
    assert betas[0] ** 0.5 < 1 / 127.5                  # the reason for its offset


@pytest.mark.parametrize("name, config", [
    ("linear", {"beta_schedule": "linear"}), ("cosine", {"beta_schedule": "squaredcos_cap_v2"})])
def test_the_schedule_of_the_samplers_is_the_same_rounded(name, config):
    schedule = Schedule.from_config(config)
    process = getattr(Process, name)(1000)
    assert_allclose(schedule.betas, process.betas, rtol=2e-7)
    assert_allclose(Process.of(schedule).alphas_cumprod, process.alphas_cumprod, rtol=2e-5)


def test_posterior_is_bayes_rule(rng):
    """q(x_{t-1} | x_t, x_start) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_start): precisions add."""
    process, t = Process.cosine(50), np.array([1, 20, 49])
    x_start, x_t = rng.normal(size=(2, 3, 2, 2, 1))
    mean, logvar = process.posterior(x_start, x_t, t)
    beta, before = (table[t][:, None, None, None] for table in (
        process.betas, np.append(1, process.alphas_cumprod[:-1])))
    precision = (1 - beta) / beta + 1 / (1 - before)
    assert_allclose(np.exp(-logvar), precision, rtol=1e-12)
    expected = ((1 - beta) ** .5 * x_t / beta + before ** .5 * x_start / (1 - before)) / precision
    assert_allclose(mean, expected, rtol=1e-10, atol=1e-12)


def test_the_first_posterior_variance_is_that_of_the_second():
    process = Process.linear(100)
    assert process.posterior_variance[0] == 0
    assert process.posterior_logvar[0] == np.log(process.posterior_variance[1])
    assert process.posterior_logvar[0] == process.posterior_logvar[1]


@pytest.mark.parametrize("T, sections, first, last", [
    (1000, "10", [0, 111, 222], [888, 999]),
    (1000, "ddim10", [0, 100, 200], [800, 900]),
    (4000, "25", [0, 167, 333, 500, 666, 833], [3666, 3832, 3999]),
    (1000, 250, [0, 4, 8, 12, 16, 20, 24, 28], [987, 991, 995, 999]),
    (300, [10, 15, 20], [0, 11, 22], [299]),
    (300, "10,15,20", [0, 11, 22], [299]),
    (1000, "10,10,10", [0, 37, 74], [962, 999]),
    (7, 7, [0, 1, 2], [5, 6]),
    (7, 1, [0], [0]),
])
def test_published_respacing(T, sections, first, last):
    kept = kept_timesteps(T, sections)
    assert kept[:len(first)].tolist() == first and kept[-len(last):].tolist() == last
    count = sum(sections) if isinstance(sections, list) else sum(
        int(part) for part in str(sections).replace("ddim", "").split(","))
    assert len(kept) == len(set(kept)) == count


def test_sections_have_their_own_numbers():
    assert kept_timesteps(300, [10, 15, 20])[9:13].tolist() == [99, 100, 107, 114]
    assert len(kept_timesteps(1001, "300,300,300")) == 900      # 1001 is no multiple of 3


def test_a_respaced_chain_keeps_alpha_bar_and_the_timesteps_of_the_model():
    process = Process.cosine(1000)
    short = process.respaced("10,10,20")
    kept = kept_timesteps(1000, "10,10,20")
    assert_allclose(short.alphas_cumprod, process.alphas_cumprod[kept], rtol=1e-9)
    x, t = np.zeros((2, 1, 1, 1)), np.array([0, 39])
    assert short.model_timesteps(t, x).tolist() == [0, 999]
    again = short.respaced("ddim20")                    # steps of steps
    assert again.timesteps.tolist() == kept[::2].tolist()
    whole = process.respaced(1000)
    assert_allclose(whole.betas, process.betas, rtol=1e-9)


def test_rescaled_timesteps():
    process, x = Process.cosine(4000, rescale_timesteps=True), np.zeros((4, 1, 1, 1), np.float32)
    found = process.model_timesteps(np.array([0, 1, 2, 3999]), x)
    assert found.tolist() == [0, .25, .5, 999.75] and found.dtype == np.float32
    short = process.respaced("25")
    assert short.model_timesteps(np.array([0, 1, 24, 24]), x).tolist() == [0, 41.75, 999.75, 999.75]


@pytest.mark.parametrize("sections, message", [
    ("ddim300", "no stride gives exactly 300 of 1000"), ("ddim", "after ddim"),
    ("600,600", "600 timesteps cannot be chosen from a section of 500"), ("", "whole number"),
    ("ten", "'ten'"), (0, "from 1"), ([], "whole number"), ([5, -1], "not -1"), (2.5, "2.5"),
    (True, "True"), ("1e3", "1e3"), (None, "None"), ("9" * 5000, "whole number"),
])
def test_bad_sections_end_in_one_line(sections, message):
    with pytest.raises(TinyldmError, match=message) as error:
        Process.cosine(1000).respaced(sections)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("make, message", [
    (lambda: Process.cosine(0), "from 1"), (lambda: Process.cosine("many"), "many"),
    (lambda: Process.linear(10), "betas"), (lambda: Process(np.array([])), "betas"),
    (lambda: Process(np.array([.1, np.nan])), "betas"), (lambda: Process(np.array([.1, 0])), "bet"),
    (lambda: Process(np.array([[.1]])), "betas"),
    (lambda: Process.cosine(10, prediction_type="score"), "prediction_type"),
    (lambda: Process(np.array([.5, 1.0])), "v_prediction"),
    (lambda: Process.cosine(10).posterior(np.zeros((1, 2)), np.zeros((1, 2)), np.array([10])),
     "from 0 to 9"),
    (lambda: Process.cosine(10).scales_like(np.zeros((1, 2)), np.array([-1])), "from 0 to 9"),
    (lambda: Process.cosine(10).scales_like(np.zeros((2, 2)), np.array([0.5, 1])), "2 whole"),
    (lambda: Process.cosine(10).scales_like(np.zeros((2, 2)), 3), "2 whole"),
])
def test_bad_processes_end_in_one_line(make, message):
    with pytest.raises(TinyldmError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
