"""The classes of a folder's pictures, for stages that train by class: ddpm.py, clip.py."""
from ...errors import TinyldmError, shorten


def find_classes(pictures, how):
    """The classes of a PictureFolder -> their names, sorted, and each item's label.

    how: "folders", the first sub-folder, cat/1.png; or "names", what stands before the first "_" of
    the file's name, cat_1.png, as in the code of Improved DDPM.
    Raises TinyldmError for a picture that has none, and for fewer than two classes.
    """
    separator = {"folders": "/", "names": "_"}[how]
    own = [item.name if how == "folders" else item.path.name for item in pictures.items]
    if wrong := [name for name in own if separator not in name]:
        raise TinyldmError(f"--classes {how}: {len(wrong)} of the pictures have no class "
                           f"({shorten(wrong)}): name them "
                           f"{'cat/1.png' if how == 'folders' else 'cat_1.png'} and the like")
    own = [name.split(separator)[0] for name in own]
    names = sorted(set(own))
    if len(names) < 2:
        raise TinyldmError(f"--classes {how} finds only the class {names[0]!r:.80}: leave it out, "
                           "or add pictures of another class")
    return names, [names.index(name) for name in own]
