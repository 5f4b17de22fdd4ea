"""The table and the figures of docs/comparison.md, from what the systems of a run have measured.

    RUN/NAME/numbers.json, samples.png -> docs/trained/comparison.json, comparison.png, sizes.png
    docs/trained/comparison.json       -> the tables in docs/comparison.md, between two comments

A page quotes a table as <!-- comparison: systems -->...<!-- end -->, or sizes.
"""
import re

from ...errors import TinyldmError, note
from ...files import make_folder, read_json, replacing, write_json
from ...training.report import new_figure, save_figure

QUOTE = re.compile(r"(<!-- comparison: (systems|sizes) -->).*?(<!-- end -->)", re.S)
TITLES = {"true": "true drawings", "round-trip": "true drawings, through the bundled VAE",
          "vae": "a VAE alone, from its prior", "ddpm": "DDPM in pixels",
          "improved-ddpm": "DDPM in pixels, learned variance",
          "latent": "latent diffusion", "dit": "DiT, in latents",
          "cascade": "cascade, 16 to 64 pixels", "prior": "prior and decoder (unCLIP)"}
TOLD = {"latent": "the caption", "cascade": "the caption", "prior": "the caption",
        "dit": "colour and shape"}
# The lines of the second figure, each from small to large.
LINES = {"text encoder": ("text-16", "text-32", "base", "text-128"),
         "UNet": ("unet-16", "unet-24", "base", "unet-48")}
LABELS = 210                # pixels of the figure's left margin


def write_table(run, docs, systems, sizes):
    """Collect what has been measured so far, and write the numbers, the figures and the page.

    Raises TinyldmError where nothing has been measured.
    """
    content = {"systems": numbers_in(run, systems), "sizes": numbers_in(run / "sizes", sizes)}
    if not content["systems"]:
        raise TinyldmError(f"{run} holds no results: run `python -m tinyldm.shapes compare NAME "
                           f"--run {run}` first, NAME being {', '.join(systems)} or sizes")
    make_folder(docs / "trained")
    write_json(docs / "trained" / "comparison.json", content)
    with replacing(docs / "trained" / "comparison.png") as temporary:
        side_by_side(run, content["systems"]).save(temporary, "PNG")
    if content["sizes"]:
        plot_sizes(content["sizes"], docs / "trained" / "sizes.png")
    page = docs / "comparison.md"
    if page.exists():
        filled = fill(page.read_text(encoding="utf-8"), content)
        with replacing(page) as temporary:
            temporary.write_text(filled, encoding="utf-8")


def numbers_in(run, names):
    """{name: what its numbers.json holds}, of those that have one."""
    return {name: read_json(run / name / "numbers.json") for name in names
            if (run / name / "numbers.json").exists()}


def fill(text, content):
    """The page with its tables as measured."""
    tables = {"systems": systems_table, "sizes": sizes_table}
    return QUOTE.sub(lambda m: f"{m[1]}\n\n{tables[m[2]](content[m[2]])}\n\n{m[3]}", text)


def systems_table(systems):
    lines = ["| system | is given | KID ×1000 | clear | as asked | bits | parameters "
             "| a picture | training |", "|---|---|---|---|---|---|---|---|---|"]
    for name, own in systems.items():
        cells = [TITLES[name], TOLD.get(name, ""), *quality(own),
                 format(own["bits"], ".2f") if "bits" in own else ""]
        cells += ([millions(own), f"{own['seconds']:.2f} s", minutes(own)] if own["steps"] else
                  [""] * 3)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes_table(sizes):
    lines = ["| size | parameters | KID ×1000 | clear | as asked | training |",
             "|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join([name, millions(own), *quality(own), minutes(own)])} |"
              for name, own in sizes.items()]
    return "\n".join(lines)


def quality(own):
    """The cells of the three numbers that tell how good the pictures are."""
    return [f"{1000 * own['kid']:.0f} ± {1000 * own['kid_std']:.0f}", f"{own['clear']:.0%}",
            f"{own['asked']:.0%}" if "asked" in own else ""]


def millions(own):
    return f"{own['parameters'] / 1e6:.2f} M"


def minutes(own):
    return f"{own['training'] / 60:.1f} min"


def side_by_side(run, systems):
    """A row of samples for each system, below one another -> a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    rows = [Image.open(run / name / "samples.png").convert("RGB") for name in systems]
    width, height = rows[0].size
    gap, font = 6, ImageFont.load_default()
    sheet = Image.new("RGB", (LABELS + width, len(rows) * (height + gap) - gap), "white")
    for i, (name, row) in enumerate(zip(systems, rows)):
        top = i * (height + gap)
        sheet.paste(row, (LABELS, top))
        ImageDraw.Draw(sheet).text((4, top + height // 2 - 6), TITLES[name], "black", font)
    return sheet


def plot_sizes(sizes, path):
    """Two lines over the parameters: where the text encoder grows, and where the UNet does."""
    try:
        figure = new_figure(9, 3.5)
    except TinyldmError as error:
        note(f"{path.name} is left out: {error}")
        return
    for axes, (what, label) in zip(figure.subplots(1, 2), [
            ("asked", "as asked"), ("kid", "KID, by the bundled VAE")]):
        for part, names in LINES.items():
            names = [name for name in names if name in sizes]
            axes.plot([sizes[name]["parameters"] / 1e6 for name in names],
                      [sizes[name][what] for name in names], marker="o", label=f"larger {part}")
        axes.set(xlabel="parameters, millions", ylabel=label, xscale="log")
        axes.set_xticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
        axes.minorticks_off()
        axes.legend()
    save_figure(figure, path, dpi=80)
