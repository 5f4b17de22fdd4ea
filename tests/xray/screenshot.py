"""python -m tests.xray.screenshot: draw docs/xray.png, the page of docs/xray.md's command.

Two columns of panels as a browser shows them: what the page is, and what one does with it.
"""
import io
import tempfile
from pathlib import Path

from PIL import Image

from tests.support import browser
from tinyldm.xray.__main__ import main

PROMPT = "a big red star left of a small blue circle on a yellow background"
TARGET = Path(__file__).parents[2] / "docs" / "xray.png"
COLUMNS = ("header", "#controls", "#machine", "#guidance"), ("#meaning", "#unet")
WIDTH, SHOWN = 1180, 760        # pixels of the page, and of a column in the picture


def part(whole, chromium, selector):
    box = chromium.execute_script("const {left, top, right, bottom} = document.querySelector("
                                  "arguments[0]).getBoundingClientRect();"
                                  "return [left, top, right, bottom]", selector)
    return whole.crop([*map(round, box)])


def column(parts, gap=12):
    width = max(image.width for image in parts)
    sheet = Image.new("RGB", (width, sum(image.height + gap for image in parts)), "#fbfaf7")
    top = 0
    for image in parts:
        sheet.paste(image, (0, top))
        top += image.height + gap
    return sheet.resize((SHOWN, round(sheet.height * SHOWN / width)), Image.Resampling.LANCZOS)


def draw():
    with tempfile.TemporaryDirectory() as folder, browser.chromium(WIDTH, 9000) as chromium:
        page = Path(folder) / "xray.html"
        main([PROMPT, "--seed", "3", "--output", str(page)])
        chromium.get(page.as_uri())
        chromium.execute_async_script("""const done = arguments[0], wait = () => 'ready' in
            document.body.dataset ? done() : setTimeout(wait, 50); wait()""")
        chromium.execute_script("xray.choose({map: 'activation|20', row: 3, column: 1})")
        whole = Image.open(io.BytesIO(chromium.get_screenshot_as_png())).convert("RGB")
        left, right = (column([part(whole, chromium, name) for name in names]) for names in COLUMNS)
    sheet = Image.new("RGB", (2 * SHOWN + 24, max(left.height, right.height)), "#fbfaf7")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (SHOWN + 24, 0))
    sheet.quantize(128, dither=Image.Dither.NONE).save(TARGET, optimize=True)
    print(f"{TARGET}: {sheet.width} x {sheet.height}, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    draw()
