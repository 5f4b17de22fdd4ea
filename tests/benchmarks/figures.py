"""The measured figures: read from the benchmarks' JSON files, and quoted in the docs.

A page quotes them between two comments, which `fill` fills in and the tests compare:

    <!-- table: unet vae -->...<!-- end -->                         a table of these benchmarks
    <!-- ratio: unet, 2 x 64x64 latents -->0.95<!-- end -->         one figure; also ours, reference
    <!-- where: 2 x 64x64 latents -->...<!-- end -->                that table of `where`, by op
    <!-- table: avx512/unet -->...<!-- end -->                      from measured/avx512, below

The first comment of one figure must not begin a line: Markdown takes such a line for HTML.
"""
import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "docs" / "measured"

# Folders in MEASURED with figures of other machines: python -m tests.benchmarks --output FOLDER.
MACHINES = "avx512",

# Every benchmark, in the order of the table, with the ratio aimed at: of all its figures, or of
# those whose name contains a word; the first one decides.
AIMS = {"unet": 0.9, "vae": {"decoder": 0.6, "encoder": 0.7}, "text": 1,
        "ddpm": 1, "upscale": 1, "dit": 1, "prior": 1, "clip_vision": 1, "inception": 1,
        "picture": {"time": 0.8, "memory": 0.7}, "startup": 1, "training": 1,
        "steps": {"memory": 0.8, "bundled": 0.9, "": 1}, "memory": 1,
        "ranks": None, "gpu": None, "kernels": None, "leads": None, "where": None}

QUOTE = re.compile(r"<!-- (table|ours|reference|ratio|where): (.+?) -->(.*?)<!-- end -->", re.S)
ABOUT = ("machine", "gpu", "cores", "threads", "python", "blas", "numpy", "cupy", "torch",
         "diffusers", "transformers")
SMALLER = {"s": "ms", "GB": "MB"}


class Figure(NamedTuple):
    """One thing measured of both: medians over the rounds."""

    title: str
    what: str
    unit: str                   # s or GB
    ours: float
    reference: float
    whose: str                  # the reference's name

    @property
    def ratio(self):
        return self.ours / self.reference


def read(folder=MEASURED):
    """{benchmark: (its figures, a line about the machine)} of the JSON files in a folder.

    Those in the folder of another machine are called MACHINE/NAME. The figures of `where` are
    texts: {case: table}.
    """
    names = [*AIMS, *(f"{machine}/{name}" for machine in MACHINES for name in AIMS)]
    return {name: _read(folder / f"{name}.json") for name in names
            if (folder / f"{name}.json").is_file()}


def _read(path):
    content = json.loads(path.read_text("utf-8"))
    about = ", ".join(f"{key} {content['about'][key]}" for key in ABOUT if key in content["about"])
    if "tables" in content:
        return content["tables"], about
    name, figures = content["reference"], []
    for row in content["figures"]:
        ours, reference = (statistics.median(row["samples"][who]) for who in ("tinyldm", name))
        figures.append(Figure(content["title"], row["what"], row["unit"], ours, reference, name))
    return figures, about


def amount(value, unit):
    """Three digits and the unit: 12.3 ms."""
    if value < 1:
        value, unit = 1000 * value, SMALLER[unit]
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def aim(name, what):
    """The ratio aimed at by a figure of a benchmark, or nothing."""
    aims = AIMS[name.rpartition("/")[2]]
    if isinstance(aims, dict):
        aims = next(value for word, value in aims.items() if word in what)
    return aims or ""


def table(names, measured):
    """A Markdown table of the benchmarks called so, those that were measured."""
    lines = ["| what | tinyldm | reference | ratio | aim |", "|---|---|---|---|---|"]
    for name in names:
        for figure in measured.get(name, [()])[0]:
            title, what, unit, ours, reference, whose = figure
            lines.append(f"| {title}: {what} | {amount(ours, unit)} | {amount(reference, unit)}, "
                         f"{whose} | {figure.ratio:.2f} | {aim(name, what)} |")
    abouts = dict.fromkeys(measured[name][1] for name in names if name in measured)
    return "\n".join([*lines, "", *(f"Measured on: {about}." for about in abouts)])


def fill(text, measured):
    """The page with all its quotes as measured; those of a benchmark not measured stay.

    Raises ValueError for a benchmark or a figure that does not exist.
    """
    def quote(match):
        kind, key, shown = match.groups()
        names = {"table": key.split(), "where": ["where"]}.get(kind, [key.partition(",")[0]])
        if not AIMS.keys() >= {name.rpartition("/")[2] for name in names}:
            raise ValueError(f"no benchmark is called {key}: there are {', '.join(AIMS)}")
        if not measured.keys() & set(names):
            return match[0]
        if kind == "where":
            shown = f"\n\n```text\n{measured['where'][0][key]}\n```\n\n"
        elif kind == "table":
            shown = f"\n\n{table(names, measured)}\n\n"
        else:
            shown = _one(kind, key, measured[names[0]][0])
        return f"<!-- {kind}: {key} -->{shown}<!-- end -->"

    return QUOTE.sub(quote, text)


def _one(kind, key, figures):
    what = key.partition(", ")[2]
    for figure in figures:
        if figure.what == what:
            value = getattr(figure, kind)
            return f"{value:.2f}" if kind == "ratio" else amount(value, figure.unit)
    raise ValueError(f"{key}: measured are {'; '.join(figure.what for figure in figures)}")


def pages():
    """The pages that may quote figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
