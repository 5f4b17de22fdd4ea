"""Pictures of a class, drawn by the model before it is trained: DreamBooth's prior preservation.

A model that trains on eight pictures of one dog forgets other dogs. So it also trains on pictures
that it drew itself for "a photo of a dog". A second PictureFolder reads them.
Source: Ruiz et al. 2022, "DreamBooth", arXiv:2208.12242, section 3.2; file names as in diffusers'
examples/dreambooth.
"""
import hashlib
import re
from collections import defaultdict
from itertools import count, islice

from ... import ranks
from ...errors import TinyldmError, shorten
from ...files import as_path, make_folder, replacing
from ...images import save
from .pictures import ENDS, list_files, progress

NAME = re.compile(r"(\d{1,9})-([0-9a-f]{40})\.jpg")


def draw_class_pictures(pipe, prompt, folder, number, seed=0, **options):
    """Draw what a folder lacks of `number` pictures -> how many were drawn.

    pipe: a pipeline that takes a prompt. options: more for its call. Picture i has the seed
    `seed` + i, and is written as i-SHA1.jpg, its prompt beside it in i-SHA1.txt, as soon as it is
    drawn: so a second call goes on where the first was interrupted. Pictures that lie there by
    other names count as well.
    Raises TinyldmError where the folder has pictures drawn for another prompt.
    """
    folder = as_path("the folder of class pictures", folder)
    if type(number) is not int or number < 1:
        raise TinyldmError("the number of class pictures must be a whole number from 1, not "
                           f"{number!r:.80}")
    make_folder(folder)
    files = ranks.first(lambda: list_files(folder, defaultdict(list)))
    there = [name for name in files if name.lower().endswith(ENDS)]
    drawn = {int(match[1]): name for name in there if (match := NAME.fullmatch(name))}
    other = [name for name in drawn.values() if prompt_of(folder / name) not in (None, prompt)]
    if other:
        raise TinyldmError(f"{folder} holds pictures of another prompt than {prompt!r:.200} "
                           f"({shorten(other)}): delete them, or name another folder")
    missing = max(0, number - len(there))
    indices = list(islice((i for i in count() if i not in drawn), missing))
    for index in progress("drawing class pictures", indices[ranks.rank()::ranks.size()]):
        image, = pipe(prompt, seed=seed + index, **options)
        path = folder / f"{index}-{hashlib.sha1(image.tobytes()).hexdigest()}.jpg"
        with replacing(path.with_suffix(".txt")) as temporary:          # a picture has its caption
            temporary.write_text(prompt, encoding="utf-8")
        save(image, path, prompt)
    ranks.gather(None)                                  # all are there
    return missing


def prompt_of(path):
    """The prompt beside a picture; None if it cannot be read."""
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
