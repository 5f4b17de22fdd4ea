"""Captions of a folder of pictures, in the forms that other training programs read.

data.py lists the files of a folder; from here each picture gets its captions, and the report its
lines about captions that are missing, empty, doubled or without a picture.

The forms, in the order that counts where a picture has several:
1. metadata.jsonl or metadata.csv with the keys file_name (relative to that file) and text, as the
   imagefolder of Hugging Face's `datasets`; in .jsonl a text may be a list of captions;
2. dog.txt, or 3. dog.caption, beside dog.png, as kohya-ss/sd-scripts; the first line counts;
4. kohya's folders `10_a dog`: ten repeats per epoch, the words as the caption.
"""
import csv
import difflib
import io
import json
import posixpath
import re
import unicodedata

from ...errors import TinyldmError, shorten

METADATA = "metadata.jsonl", "metadata.csv"
ENDS = ".txt", ".caption"
LONGEST = 1 << 16           # characters to read of a caption file
MOST_REPEATS = 1000         # a larger number in a folder's name is a year or a date, not repeats

NO_CAPTION = "pictures without a caption, which train with an empty one"
EMPTY = "pictures with an empty caption"
ORPHANS = "captions without a picture"
SEVERAL = "pictures with several captions, of which the first counts"
LINES = "caption files of several lines, of which the first counts"
UNREADABLE = "caption files that cannot be read"
MISNAMED = "files to rename if they are meant as metadata.jsonl or metadata.csv"
MANY = f"folders whose number is above {MOST_REPEATS} and is not taken for repeats"
NUMBERED = re.compile(r"(\d{1,30})_([^/]+)/")      # at the beginning of a picture's name
EXAMPLE = '{"file_name": "dog.png", "text": "a photo of a dog"}'


def find_captions(root, files, pictures, findings):
    """-> {picture: a tuple of one caption or more}, {picture: in which form they were}.

    files, pictures: names relative to the folder `root`, sorted, with "/" between folders.
    findings: {what is wrong: list of names}, to which this adds.
    Raises TinyldmError for a metadata file that is damaged or lacks a key.
    """
    found, places, forms = {}, {}, {}

    def give(picture, texts, place, form):
        if picture in found:
            findings[SEVERAL].append(f"{picture}: {places[picture]}, {place}")
            return
        texts = tuple(text.strip() for text in texts if text.strip())
        if not texts:
            findings[EMPTY].append(f"{picture}: {place}")
        found[picture], places[picture] = texts or ("",), place
        forms[picture] = form

    orphans, known = [], set(pictures)
    by_name = {_same(name): name for name in pictures}
    for file in files:
        folder, name = posixpath.split(file)
        if name in METADATA:
            for file_name, texts in read_metadata(root / file):
                picture = by_name.get(_same(posixpath.normpath(posixpath.join(folder, file_name))))
                if picture is None:
                    orphans.append(file_name)
                elif texts is not None:
                    give(picture, texts, file, name)
        elif file not in known and is_misnamed(name):
            findings[MISNAMED].append(file)
    by_stem = {}
    for picture in pictures:
        by_stem.setdefault(posixpath.splitext(picture)[0], []).append(picture)
    for end in ENDS:
        for file in files:
            stem, its_end = posixpath.splitext(file)
            if its_end.lower() == end:
                text = _first_line(root / file, file, findings)
                for picture in by_stem.get(stem, ()) if text is not None else ():
                    give(picture, [text], file, f"{end} files")
                if stem not in by_stem:
                    orphans.append(file)
    for picture in pictures:
        _, words = kohya_folder(picture)
        if words and picture not in found:
            give(picture, [words], picture, "the names of folders")
    if orphans:
        without = [picture for picture in pictures if picture not in found]
        findings[ORPHANS] += [_with_hint(orphans[0], without), *orphans[1:]]
    return found, forms


def kohya_folder(picture):
    """The repeats and the words in the name of the folder N_words that a picture lies in; 1, "".
    """
    match = NUMBERED.match(picture)
    repeats = int(match[1]) if match else 0
    return (repeats, match[2].strip()) if 1 <= repeats <= MOST_REPEATS else (1, "")


def years(pictures):
    """The folders whose number is too large to be one of repeats."""
    matches = filter(None, map(NUMBERED.match, pictures))
    return sorted({match[0][:-1] for match in matches if int(match[1]) > MOST_REPEATS})


def is_misnamed(name):
    """Whether a file's name is nearly that of a metadata file, such as metadata.json1."""
    return name not in METADATA and not name.lower().endswith(ENDS) and bool(
        difflib.get_close_matches(name.lower(), METADATA, 1, 0.8)
        or name.lower().startswith("metadata."))


def _same(name):
    """Names that look the same are the same: file systems write letters with accents in two ways.
    """
    return unicodedata.normalize("NFC", name)


def _with_hint(orphan, pictures):
    """The name of a caption without a picture, and of the picture that it may belong to."""
    name = posixpath.basename(orphan.replace("\\", "/"))
    for picture in pictures:
        if posixpath.basename(picture) in (name, posixpath.splitext(name)[0]):
            return f"{orphan}: is it for {picture}?"
    by_stem = {posixpath.splitext(picture)[0].lower(): picture for picture in pictures}
    near = difflib.get_close_matches(posixpath.splitext(orphan)[0].lower(), by_stem, 1)
    return f"{orphan}: is it for {by_stem[near[0]]}?" if near else orphan


def _first_line(path, name, findings):
    """The first line that is not blank; "" if there is none; None if the file cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line for line in file.read(LONGEST).splitlines() if line.strip()]
    except UnicodeDecodeError:
        findings[UNREADABLE].append(f"{name}: not UTF-8")
        return None
    except OSError as error:
        findings[UNREADABLE].append(f"{name}: {error.strerror}")
        return None
    if len(lines) > 1:
        findings[LINES].append(name)
    return lines[0] if lines else ""


# ---- metadata.jsonl, metadata.csv ----------------------------------------------------------------

def read_metadata(path):
    """-> a list of (file_name, texts), where texts is a list, or None for a picture without.

    Raises TinyldmError for a file that cannot be read, and for keys that are missing: it names
    those that are there.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(_csv(text) if path.suffix == ".csv" else _json_lines(text))
    except (OSError, csv.Error, ValueError, RecursionError) as error:
        raise TinyldmError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): "
                           f"write UTF-8, one picture per line, such as {EXAMPLE}") from None
    found = [(number, _key(path, number, row), row.get("text")) for number, row in rows]
    if rows and not any("text" in row for _, row in rows):
        raise TinyldmError(f"{path} has no key text, but ({shorten(list(rows[0][1]))}): name the "
                           "key of the captions text")
    return [(file_name, _texts(path, number, text)) for number, file_name, text in found]


def _json_lines(text):
    """-> (line number, dict) of each line."""
    for number, line in enumerate(text.split("\n"), 1):     # other line ends may stand in strings
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            yield number, row


def _csv(text):
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield reader.line_num, {key: value for key, value in row.items() if key is not None}


def _key(path, number, row):
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        keys = [key for key in row if key != "file_name"]
        raise TinyldmError(f"{path}, line {number}: expected the name of a picture in the key "
                           f"file_name, found {shorten(keys)}: each line is like {EXAMPLE}")
    return name


def _texts(path, number, text):
    texts = text if isinstance(text, list) else [text]
    if text is None:
        return None
    try:
        for one in texts:
            one.encode()                                # fails for half of a surrogate pair
    except (AttributeError, UnicodeEncodeError):
        raise TinyldmError(f"{path}, line {number}: text must be a string of valid Unicode or a "
                           f"list of them, not {text!a:.80}") from None
    return texts


# ---- the encoder's length ------------------------------------------------------------------------

def fit(caption, tokenizer):
    """The most words of a caption that fit the tokenizer's length -> the text, tokens left out.

    A word that alone is too long, as in writing without spaces, is cut between letters.
    """
    limit = tokenizer.model_max_length - 2              # without start and end
    tokens = len(tokenizer.ids(caption))
    if tokens <= limit:
        return caption, 0
    ends = [match.end() for match in re.finditer(r"\S+", caption)]
    if len(tokenizer.ids(caption[:ends[0]])) > limit:
        ends = range(1, ends[0])
    low, high = 0, len(ends)                            # ends[:low] fit, ends[high:] do not
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.ids(caption[:ends[middle]])) <= limit:
            low = middle + 1
        else:
            high = middle
    kept = caption[:ends[low - 1]] if low else ""
    return kept, tokens - len(tokenizer.ids(kept))
