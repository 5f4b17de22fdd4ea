"""The x-ray's page in a real browser: every panel, every interaction, and the numbers it shows."""
import json
from functools import partial

import numpy as np
import pytest

import tinyldm
from tests.support import browser
from tests.support.pixel_models import write_model
from tests.support.small_pipelines import CONFIGURATIONS, dit, sdxl
from tests.support.xray import WORDS, copied, stand_in
from tinyldm.xray.page import decoder, page

PANELS = ["machine", "trajectory", "words", "meaning", "unet", "guidance", "gradient", "numbers"]


class Page:
    """An open page, and what the tests ask of it."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.get(path.as_uri())
        assert self.js("return new Promise(done => { const wait = () => 'ready' in "
                       "document.body.dataset ? done(true) : setTimeout(wait, 20); wait(); })")

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def drawn(self, panel):
        """Every canvas of a panel, and the machine's images, as text."""
        return self.js("""const root = document.getElementById(arguments[0]);
            return [...root.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())
              .concat([...root.querySelectorAll('image')].map(own => own.getAttribute('href')))""",
                       panel)

    def move(self, selector, value):
        """Move a slider, or choose from a list, as a hand does."""
        self.js("""const input = document.querySelector(arguments[0]); input.value = arguments[1];
            input.dispatchEvent(new Event('input', {bubbles: true}));
            input.dispatchEvent(new Event('change', {bubbles: true}))""", selector, value)

    def click(self, selector, x=0.5, y=0.5):
        """Click at a place of an element, given as shares of its sides."""
        self.js("""const own = document.querySelector(arguments[0]);
            own.scrollIntoView({block: 'center', behavior: 'instant'});
            const box = own.getBoundingClientRect();
            own.dispatchEvent(new MouseEvent('click', {bubbles: true,
              clientX: box.left + arguments[1] * box.width,
              clientY: box.top + arguments[2] * box.height}))""", selector, x, y)

    def values(self, key):
        """The values of a map."""
        return np.array(self.js("const map = xray.mapOf(arguments[0]);"
                                "return [...Array(map.h * map.w).keys()].map(map.value)", key))

    def state(self):
        return self.js("return xray.state")

    def check_quiet(self):
        assert browser.errors(self.driver) == []
        assert browser.requests(self.driver) == []


@pytest.fixture(scope="module")
def record():
    return stand_in()


@pytest.fixture(scope="module")
def driver():
    with browser.chromium(width=1280, height=900) as driver:
        yield driver


@pytest.fixture(scope="module")
def path(record, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "x ray.html"
    path.write_text(page(record), encoding="utf-8")
    return path


@pytest.fixture
def shown(driver, path):
    shown = Page(driver, path)
    yield shown
    shown.check_quiet()


# ---- every panel shows ------------------------------------------------------------------------

@pytest.mark.parametrize("panel", PANELS)
def test_the_panel_shows(shown, panel):
    assert "Left out" not in shown.text(f"#{panel}")
    assert shown.text(f"#{panel} .body").strip()
    drawn = shown.drawn(panel)
    if panel not in ("gradient", "numbers"):
        assert len(drawn) > 4 and len(set(drawn)) > 3
    if panel != "numbers":
        assert "tinyldm/" in shown.text(f"#{panel}") and ", line " in shown.text(f"#{panel}")


def test_what_is_drawn_is_what_was_recorded(shown, record):
    """The pixels of a picture, and the colours of a latent's signs."""
    pixels = shown.js("""const canvas = document.querySelector('[data-map="picture|images"]');
        return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]""")
    step = shown.state()["step"]
    expected = record.arrays["images"][step]
    assert np.array_equal(np.reshape(pixels, (*expected.shape[:2], 4))[..., :3], expected)
    for name in ("x_t", "x_start", "noise", "model_output"):
        found = shown.js("return [...xray.LATENTS[arguments[0]](xray.state.step)]", name)
        assert abs(np.array(found) - record.arrays[name][step].ravel()).max() < 1e-4


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_no_sideways_scroll(path, width):
    with browser.chromium(width=width, height=800) as driver:
        shown = Page(driver, path)
        assert shown.js("return document.documentElement.scrollWidth") == width
        shown.click('#words [data-cells]')              # the numbers appear below
        assert shown.js("return document.documentElement.scrollWidth") == width
        shown.check_quiet()


def test_without_javascript_the_strip_shows(path):
    with browser.chromium(width=800, height=800, javascript=False) as driver:
        driver.get(path.as_uri())
        image = driver.find_element("css selector", "#strip img")
        assert image.size["width"] > 700 and image.size["height"] > 50
        assert "star" in image.get_attribute("alt")
        assert "need JavaScript" in driver.find_element("css selector", "noscript").text
        assert browser.requests(driver) == []


# ---- every interaction changes what it should -------------------------------------------------

def test_the_step_moves_every_panel_that_depends_on_it(shown):
    shown.move("#step", 1)
    before = {panel: shown.drawn(panel) for panel in PANELS}
    number = shown.text("#numbers [data-value]")
    shown.move("#step", 4)
    assert "step 5 of 5" in shown.text("#step-text")
    for panel in ("machine", "trajectory", "words", "meaning", "unet", "guidance"):
        assert shown.drawn(panel) != before[panel], panel
    assert shown.drawn("gradient") == before["gradient"]
    assert shown.text("#numbers [data-value]") != number


def test_arrow_keys_move_the_step_and_play_moves_it_on(shown):
    from selenium.webdriver.common.keys import Keys

    shown.move("#step", 1)
    body = shown.driver.find_element("tag name", "body")
    body.send_keys(Keys.ARROW_RIGHT)
    assert shown.state()["step"] == 2
    body.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert shown.state()["step"] == 0
    shown.click("#play")
    assert shown.js("return new Promise(done => setTimeout(() => done(xray.state.step), 700))") > 0
    shown.click("#play")
    assert shown.text("#play").endswith("Play")
    later = "return new Promise(done => setTimeout(() => done(xray.state.step), 400))"
    assert shown.state()["step"] == shown.js(later)


def test_the_film_leads_to_a_step(shown):
    shown.click("#trajectory .film button:nth-child(1)")
    assert shown.state()["step"] == 0


def test_a_word_changes_the_panels_of_words(shown):
    shown.click('#word-choice [data-reader="1"]')
    before = {panel: shown.drawn(panel) for panel in PANELS}
    shown.click(f'#word-choice [data-reader="{len(WORDS)}"]')
    for panel in ("words", "meaning"):
        assert shown.drawn(panel) != before[panel]
    for panel in ("trajectory", "unet", "guidance"):
        assert shown.drawn(panel) == before[panel]
    assert WORDS[-1] in shown.text("#meaning .cells")
    assert shown.text("#machine-word") == WORDS[-1]
    assert shown.js("""return [...document.querySelectorAll('[aria-pressed="true"][data-reader]')]
        .map(own => own.textContent)""") == [WORDS[-1]] * 2


def test_hovering_shows_a_token_and_leaving_it_ends(shown):
    before = shown.drawn("words")
    hover = """document.querySelector('#words [data-reader="0"]').dispatchEvent(
        new PointerEvent(arguments[0], {pointerType: 'mouse'}))"""
    shown.js(hover, "pointerenter")
    assert shown.drawn("words") != before and "start" in shown.text("#words [data-text]")
    shown.js(hover, "pointerleave")
    assert shown.drawn("words") == before


def test_end_and_padding_can_be_chosen_but_not_left_out(shown):
    shown.click(f'#words [data-reader="{len(WORDS) + 2}"]')
    assert "67 × padding" in shown.text("#words [data-text]")
    assert shown.js("return document.querySelector('[data-without]').checkVisibility("
                    "{checkVisibilityCSS: true})") is False


def test_layer_and_head(shown, record):
    lit = "return document.querySelector('#words [data-lit]').toDataURL()"
    before = shown.js(lit)
    shown.move('#words [name="layer"]', "2")
    chosen = shown.js(lit)
    shown.move('#words [name="head"]', "1")
    assert len({before, chosen, shown.js(lit)}) == 3
    shown.click('#words canvas[data-layer="0"][data-head="0"]')
    state = shown.state()
    assert (state["layer"], state["head"]) == ("0", "0")
    assert shown.js("return document.querySelector('#words [name=layer]').value") == "0"
    weights = record.arrays["attention/down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    expected = weights[state["step"], 0, ..., state["reader"]]
    assert abs(shown.values("attention|0|0") - expected.ravel()).max() < expected.max() / 100


def test_average_attention(shown, record):
    """Over heads and layers of different sizes: the small maps are enlarged."""
    found = shown.values("attention||").reshape(16, 16)
    state, maps = shown.state(), []
    for name, weights in record.arrays.items():
        if name.startswith("attention/"):
            own = weights[state["step"], ..., state["reader"]].mean(axis=0)
            maps.append(np.kron(own, np.ones((16 // len(own), 16 // len(own)))))
    expected = np.mean(maps, axis=0)
    assert abs(found - expected).max() < expected.max() / 100


def test_a_click_on_a_block_shows_what_it_reads(shown):
    shown.click('[data-block="2"] canvas', 0.6, 0.1)
    assert shown.state()["map"] == "activation|2"
    frames = shown.js("""return [...document.querySelectorAll('#unet .frame.read')].map(own =>
        [own.closest('[data-block]').dataset.block, own.style.left, own.style.width])""")
    # A resnet on 4 x 4 cells sees two to each side; the block before has 8 x 8.
    assert [frame[0] for frame in frames] == ["1"]
    assert "down_blocks.0" in shown.text("#unet [data-text]")
    shown.move('#unet [name="shows"]', "gradient")
    assert "gradient of the star" in shown.js(
        "return document.querySelector('[data-block=\"2\"] canvas').getAttribute('aria-label')")


def test_a_part_of_the_machine_leads_to_its_panel(shown):
    shown.js("document.documentElement.style.scrollBehavior = 'auto'")
    shown.js("document.querySelector('#machine [data-node=guidance]').dispatchEvent("
             "new MouseEvent('click', {bubbles: true, cancelable: true}))")
    assert shown.js("return location.hash") == "#guidance"
    top = shown.js("return document.querySelector('#guidance').getBoundingClientRect().top")
    assert 0 <= top < 450
    label = shown.js("return document.querySelector('[data-node=guidance]').ariaLabel")
    assert label.startswith("Guidance, ") and "guidance.py, line " in label


# ---- numbers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [0, 1, 6.5, 10])
def test_guidance_by_hand_equals_python(shown, record, scale):
    shown.move("#step", 2)
    shown.move("#scale", scale)
    arrays = {name: record.arrays[name][2].astype(float) for name in ("x_t", "uncond", "cond")}
    output = arrays["uncond"] + scale * (arrays["cond"] - arrays["uncond"])
    alpha_bar = float(record.arrays["alpha_bar"][2])
    expected = alpha_bar ** 0.5 * arrays["x_t"] - (1 - alpha_bar) ** 0.5 * output
    found = shown.js("return [...xray.LATENTS.guided(xray.state.step)]")
    assert abs(np.array(found) - expected.ravel()).max() < 1e-4 * abs(expected).max()
    text = shown.text("#guided-numbers").replace("−", "-")
    assert f"std {expected.std():.3f}" in text
    assert shown.text("#scale-text") == f"{scale:.1f}"


def test_the_linear_decoder_equals_numpy(shown, record):
    found = shown.values("colours|x_start")
    weight = decoder(record.arrays["x_start"], record.arrays["images"])
    x = np.pad(record.arrays["x_start"][shown.state()["step"]], [(1, 1), (1, 1), (0, 0)], "edge")
    rows = np.concatenate([x[i:i + 16, j:j + 16] for i in range(3) for j in range(3)], -1)
    pixels = (rows @ weight[:-1] + weight[-1]).reshape(16, 16, 4, 4, 3).swapaxes(1, 2)
    assert np.allclose(np.reshape(found, (64, 64, 3)), pixels.reshape(64, 64, 3), atol=0.05)


@pytest.mark.parametrize("selector, name, channel", [
    ('#trajectory [data-map="latent|x_t|3"]', "x_t", 3),
    ('#trajectory [data-map="latent|x_start|0"]', "x_start", 0),
    ('#trajectory [data-map="latent|noise|1"]', "noise", 1),
])
def test_a_click_on_a_cell_shows_its_value(shown, record, selector, name, channel):
    """Row 5, column 10 of 16; its formula with numbers ends in the same value."""
    shown.click(selector, 9.5 / 16, 4.5 / 16)
    value = record.arrays[name][shown.state()["step"], 4, 9, channel]
    text = f"{value:.3f}".replace("-", "−") if abs(value) >= 0.1 else None
    assert "row 5 of 16, column 10 of 16" in shown.text("#numbers [data-where]")
    if text:
        assert shown.text("#numbers [data-value]") == text
        assert f"= {text}" in shown.text("#numbers [data-formula]")
    around = shown.js("return [...document.querySelectorAll('.around button')]"
                      ".map(button => button.textContent)")
    assert len(around) == 9 and around[4] == shown.text("#numbers [data-value]")
    shown.click(".around button:nth-child(2)")
    assert shown.state()["row"] == 3 and shown.text("#numbers [data-value]") == around[1]
    assert shown.js("return document.querySelector('#numbers').classList.contains('pinned')")
    shown.click("#unpin")
    assert not shown.js("return document.querySelector('#numbers').classList.contains('pinned')")


def test_at_the_edge_there_are_fewer_neighbours(shown):
    shown.click('#trajectory [data-map="latent|x_t|0"]', 0.01, 0.01)
    assert shown.js("return document.querySelectorAll('.around button:disabled').length") == 5


def test_a_cell_can_be_chosen_without_a_pointer(shown):
    shown.move("#numbers select", "attention|1|")
    assert "attention to" in shown.text("#numbers [data-what]")
    assert "sum to 1" in shown.text("#numbers [data-formula]")


def test_the_checked_gradient(shown, record):
    text = shown.text("#gradient")
    assert str(record.check["claimed"]) in text and str(record.check["measured"]) in text


def test_shares(shown, record):
    row = shown.js("""return [...document.querySelectorAll('#meaning tr[data-word="3"] td.number')]
        .map(own => own.textContent)""")
    shares = (record.boxes[0].mask.mean(), record.arrays["attention_share"][3, 0],
              record.arrays["gradient_share"][3, 0])
    assert row == [f"{100 * share:.0f} %" for share in shares]


# ---- less than everything, and the real thing -------------------------------------------------

def test_what_is_left_out_is_said(driver, record, tmp_path):
    arrays = {name: array for name, array in record.arrays.items()
              if name not in ("uncond", "context", "without", "word_gradient", "gradient_steps",
                              "embedding_gradient", "attention_share", "gradient_share")
              and not name.startswith(("attention/", "gradient/"))}
    path = tmp_path / "x.html"
    path.write_text(page(copied(record, arrays=arrays, words=[], tokens=[], boxes=[], check={},
                                guidance_scale=None, left_out=["no text: <b>reads</b> no prompt"])),
                    encoding="utf-8")
    shown = Page(driver, path)
    missing = [panel for panel in PANELS if "Left out" in shown.text(f"#{panel} .body")]
    assert missing == ["words", "meaning", "guidance", "gradient"]
    assert "no text: <b>reads</b> no prompt" in shown.text("#left-out")
    shown.move("#step", 0)
    shown.click('[data-block="2"] canvas')
    shown.check_quiet()


KINDS = {"stable_diffusion": (CONFIGURATIONS[0], "a red cat!", []),
         "xl": (sdxl, "a red cat!", []),
         "dit": (dit, 1, ["words", "meaning"]),
         "pixels": (partial(write_model, kind="plain"), "", ["words", "meaning", "guidance"])}


@pytest.mark.parametrize("kind", KINDS)
def test_other_models(kind, driver, tmp_path):
    build, prompt, left_out = KINDS[kind]
    pipe = tinyldm.load(build(tmp_path / "model"))
    record = tinyldm.xray(pipe, prompt, num_inference_steps=2)
    (tmp_path / "x.html").write_text(page(record), encoding="utf-8")
    shown = Page(driver, tmp_path / "x.html")
    missing = [panel for panel in PANELS if "Left out" in shown.text(f"#{panel} .body")]
    assert missing == left_out
    assert bool(shown.text("#left-out")) == bool(record.left_out)
    shown.move("#step", 1)
    found = shown.js("return [...xray.LATENTS.x_start(1)]")
    assert abs(np.array(found) - record["x_start"][1].ravel()).max() < 1e-3
    shown.check_quiet()


def test_a_hostile_prompt_is_text(driver, record, tmp_path):
    prompt = '</script><b id="bold">"quotes" & \'{{facts}}\''
    path = tmp_path / "x.html"
    path.write_text(page(copied(record, prompt=prompt)), encoding="utf-8")
    shown = Page(driver, path)
    assert shown.text("h1") == prompt and shown.js("return document.querySelector('#bold')") is None
    assert json.loads(shown.text("#facts"))["prompt"] == prompt
    shown.check_quiet()


def test_the_bundled_model(driver, tmp_path):
    record = tinyldm.xray(tinyldm.load(), "a big red star on a yellow background", seed=3,
                          num_inference_steps=4, gradients=False)
    path = tmp_path / "x.html"
    path.write_text(page(record), encoding="utf-8")
    shown = Page(driver, path)
    for step in range(4):
        shown.move("#step", step)
        for name in ("x_start", "noise", "model_output"):
            found = shown.js("return [...xray.LATENTS[arguments[0]](xray.state.step)]", name)
            expected = record[name][step].ravel()
            assert abs(np.array(found) - expected).max() < 2e-4 * max(1, abs(expected).max())
    missing = [panel for panel in PANELS if "Left out" in shown.text(f"#{panel} .body")]
    assert missing == ["meaning", "gradient"]
    shown.check_quiet()
