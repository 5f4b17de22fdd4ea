"""CLIP's tokenizer: a prompt becomes the row of token ids that the text encoder reads.

Byte-pair encoding: the text is put in lower case and cut into words. Each word is written as its
bytes, one letter per byte, and the last letter gets the suffix "</w>". Then the pair of neighbours
that comes first in merges.txt is joined, again and again, until no pair of the list is left.
vocab.json gives the ids of the results. A start token goes before them, an end token and padding
after them, up to a fixed length.
The `tokenizers` library joins the pairs; this file configures it like CLIP.

Sources: Sennrich et al. 2016, "Neural machine translation of rare words with subword units",
arXiv:1508.07909; Radford et al. 2021 (CLIP), arXiv:2103.00020; the file format is that of the
`tokenizer` folder of published Stable Diffusion weights.
"""
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import TinyldmError
from ..files import read_json, write_json

# Stable Diffusion 1's, for folders that do not name them. The order matters: if two entries are the
# same token, the later one decides how it is recognised in a text.
SPECIAL_TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                  "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
MAX_LENGTH = 77
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
ADDED = "added_tokens.json"                             # of transformers < 4.34
FILES = ("vocab.json", "merges.txt", "tokenizer.json", ADDED, *SETTINGS)
NO_LIMIT = 10**6            # folders written without a length have 10**30, or null
PROBE = "a Cat's 7, \u00e9\u732b!\0"                     # whatever an encoder may stumble over

# Special tokens, English endings, words, single digits, runs of anything else except spaces.
WORDS = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
         r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


class Word(NamedTuple):
    """A word of a prompt, and the positions of its tokens in the row of ids."""

    text: str
    tokens: range


class Tokenizer:
    """Turns a prompt into token ids.

    backend: a tokenizers.Tokenizer. special: {"bos_token": the AddedToken, ...} as SPECIAL_TOKENS.
    model_max_length: the length of a row of ids. folder: from which it was read.
    """

    def __init__(self, backend, special, model_max_length, folder):
        self.backend, self.model_max_length, self.folder = backend, model_max_length, folder
        self.start, self.end, self.padding = (backend.token_to_id(special[name].content)
                                              for name in ("bos_token", "eos_token", "pad_token"))
        self.comma = backend.token_to_id(",</w>")       # None where the vocabulary has none
        self.learned = {}                               # a word's id -> the ids of its vectors

    @classmethod
    def from_folder(cls, path, padding=None):
        """Read a tokenizer folder: tokenizer.json, or vocab.json and merges.txt.

        tokenizer_config.json and special_tokens_map.json are optional. If they disagree, the latter
        decides: only there does Stable Diffusion 2 say that its padding token is "!". Learned words
        are in the former's added_tokens_decoder; only where it has none, the latter and
        added_tokens.json count, which older versions of transformers wrote. padding: a padding
        token to use instead. Raises TinyldmError, naming the file, if it is missing or malformed,
        and for a special token that the vocabulary lacks.
        """
        folder = Path(path)
        config_file, map_file = (folder / name for name in SETTINGS)
        config = read_json(config_file) if config_file.exists() else {}
        newer = config.get("added_tokens_decoder") is not None
        special = read_json(map_file) if map_file.exists() and not newer else {}
        more = more_special_tokens(special, map_file) + more_special_tokens(config, config_file)
        special = {name: special.get(name) or config.get(name) or default
                   for name, default in SPECIAL_TOKENS.items()}
        special["pad_token"] = padding or special["pad_token"]
        special = {name: added_token(entry, True, folder) for name, entry in special.items()}

        length = config.get("model_max_length", MAX_LENGTH)
        length = NO_LIMIT if length is None else length
        if not isinstance(length, (int, float)) or not length >= 3:     # also true for NaN
            raise TinyldmError(f"{config_file}: model_max_length must be a number of at least 3, "
                               f"got {length!r}: correct or remove it")
        with engine_errors(f"the tokenizer in {folder} cannot be used", "get its files again"):
            backend, declared = read_engine(folder, special["unk_token"].content)
            if newer:
                add_declared_tokens(backend, config["added_tokens_decoder"], config_file)
            elif (folder / ADDED).exists():
                names = {token.content for token in special.values()}
                declared = read_added_tokens(folder / ADDED, names) | declared
                add_declared_tokens(backend, declared, folder / ADDED)
            else:
                add_declared_tokens(backend, declared, folder / "tokenizer.json")
            add_special_tokens(backend, special.values(), folder)
            backend.add_tokens([added_token(entry, True, folder) for entry in more])
            backend.encode(PROBE, add_special_tokens=False)
            return cls(backend, special, int(length) if length < NO_LIMIT else MAX_LENGTH, folder)

    def save(self, path):
        """Copy the files that from_folder read into a new or an empty folder, with the padding
        token and the length added.

        Raises TinyldmError if the files are gone or cannot be written, and for a tokenizer with new
        words: the format has no place for a word of several vectors.
        """
        if self.learned:
            words = ", ".join(map(self.backend.id_to_token, self.learned))
            raise TinyldmError(f"textual inversions cannot be saved with a pipeline ({words}): "
                               "save it without them, and load them again")
        if self.folder is None:
            raise TinyldmError("this tokenizer was not read from a folder, so it has no files to "
                               "save: make it with Tokenizer.from_folder")
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=not any(path.glob("*")))
            for file in (self.folder / name for name in FILES):
                if file.exists():
                    shutil.copyfile(file, path / file.name)
        except OSError as error:
            raise TinyldmError(f"cannot copy the tokenizer of {self.folder} to {path} "
                               f"({error.strerror or error}): choose another place") from None
        if not (path / "vocab.json").exists() and not (path / "tokenizer.json").exists():
            raise TinyldmError(f"the tokenizer's files in {self.folder} are gone: put them back")
        padding = self.backend.id_to_token(self.padding)
        for name in SETTINGS:
            settings = read_json(path / name) if (path / name).exists() else {}
            said = settings.get("pad_token")
            if (said["content"] if isinstance(said, dict) else said) != padding:
                settings["pad_token"] = padding
            if name == "tokenizer_config.json":
                settings |= {"tokenizer_class": "CLIPTokenizer",
                             "model_max_length": self.model_max_length}
            write_json(path / name, settings)

    def __call__(self, text):
        """text -> ids (1, model_max_length) int64: start, the text's tokens, end, padding.

        A long text loses its last tokens, but not the end token; prompt.py keeps all, in chunks.
        Raises TinyldmError for what is not a string of valid Unicode.
        """
        return self.row(self.ids(text)[:self.model_max_length - 2])

    def ids(self, text):
        """text -> the list of its token ids, of any length, without start and end token."""
        self.check(text)
        with engine_errors(f"the tokenizer in {self.folder} cannot read {text!r:.40}",
                           "get its files again, or leave out the word"):
            found = self.backend.encode(text, add_special_tokens=False).ids
        return [number for first in found for number in self.learned.get(first, [first])]

    def texts(self, ids):
        """ids (M,), or (1,M) as __call__ gives them -> the list of their M texts, for people.

        Start, end and padding are "<start>", "<end>" and "<padding>"; where the padding token is
        the end token, the first one of a row is "<end>". Of a word of several tokens, each but the
        last has a hyphen: "super-", "cali-", "stic". Raises TinyldmError for an unknown id.
        """
        names, ended = [], False
        for number, text in self._pieces(ids):
            if number == self.start:
                text, ended = "<start>", False
            elif ended and number in (self.padding, self.end):
                text = "<padding>"
            elif number == self.end:
                text, ended = "<end>", True
            else:
                text = _read(text) + "-" * (not self._ends_word(number, text))
            names.append(text)
        return names

    def words(self, ids):
        """ids (M,), or (1,M) as __call__ gives them -> the list of Words, in their order.

        A word is what was cut out of the text before its bytes were joined (a word, a sign or a
        digit), or a learned word with all of its vectors. Start, end and padding belong to none, so
        each position lies in the range of one word or of none. Raises TinyldmError for an unknown
        id.
        """
        found, letters, ended = [], [], False
        for i, (number, text) in enumerate(self._pieces(ids)):
            inside = number not in (self.start, self.end) and not (
                ended and number == self.padding)
            if inside:
                letters.append(text)
            else:
                ended = number != self.start
            if letters and (not inside or self._ends_word(number, text)):   # or it was cut off
                stop = i + inside
                first = self.backend.token_to_id(letters[0])
                text = letters[0] if first in self.learned else "".join(letters)
                found.append(Word(_read(text), range(stop - len(letters), stop)))
                letters = []
        return found

    def _pieces(self, ids):
        """[(id, its entry in the vocabulary)]. Raises TinyldmError for an id that has none."""
        ids = np.asarray(ids).reshape(-1).tolist()
        pieces = [(number, self.backend.id_to_token(number)) for number in ids]
        if unknown := [number for number, text in pieces if text is None]:
            raise TinyldmError(f"the vocabulary has {len(self)} tokens, none of them with the id "
                               f"{unknown[0]}: give ids of this tokenizer")
        return pieces

    def _ends_word(self, number, text):
        """Whether no token of the same word follows this one."""
        if any(number in ids[:-1] for ids in self.learned.values()):
            return False
        return text.endswith("</w>") or number in self.backend.get_added_tokens_decoder()

    def __len__(self):
        return self.backend.get_vocab_size()

    def new_tokens(self, word, count):
        """The names of a new word's `count` tokens: word, word_1, word_2 ...

        Raises TinyldmError for a word that is not a text or is blank, and for a name that is taken.
        Case does not distinguish added tokens, because they are found in lower-case text.
        """
        self.check(word, "a new word")
        if not word.strip():
            raise TinyldmError(f"a new word must have a letter or sign, got {word!r:.40}: give it "
                               "another name")
        names = [word, *(f"{word}_{i}" for i in range(1, count))]
        added = self.backend.get_added_tokens_decoder().values()
        added = {token.content.lower() for token in added}
        taken = [name for name in names
                 if self.backend.token_to_id(name) is not None or name.lower() in added]
        if taken:
            raise TinyldmError(f"{taken[0]!a:.80} is a token of the vocabulary already: "
                               "give the word another name")
        return names

    def learn(self, names):
        """Add the names that new_tokens gave -> their ids. In a prompt, the first one means all."""
        self.backend.add_tokens(names)
        ids = [self.backend.token_to_id(name) for name in names]
        self.learned[ids[0]] = ids
        return ids

    def row(self, ids):
        """At most model_max_length - 2 ids -> what __call__ returns."""
        ids = [self.start, *ids, self.end]
        ids += [self.padding] * (self.model_max_length - len(ids))
        return np.array([ids], np.int64)

    @staticmethod
    def check(text, what="a prompt"):
        """Raise TinyldmError for what is not a string, or has a lone surrogate."""
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise TinyldmError(f"{what} must be a string of valid Unicode, "
                               f"got {text!a:.80}: pass plain text") from None


def _read(text):
    """Entries of the vocabulary, joined -> the text: their letters stand for bytes."""
    return decoders.ByteLevel().decode([text.replace("</w>", "")])


@contextmanager
def engine_errors(failed, advice):
    """Turn what the tokenizers library raises into TinyldmErrors, one line each.

    It has no class of its own for errors. Where its code in Rust panics, it raises a BaseException
    that is no Exception.
    """
    try:
        yield
    except TinyldmError:
        raise
    except BaseException as error:
        panic = type(error).__module__ == "pyo3_runtime"
        if not panic and not isinstance(error, Exception):
            raise                                       # Ctrl-C
        raise TinyldmError(f"{failed} ({error}): {advice}") from None


def read_engine(folder, unk_token):
    """A folder's byte-pair encoder -> tokenizers.Tokenizer, added tokens as added_tokens_decoder.

    Of tokenizer.json only the vocabulary, the merges and the added tokens are read, as transformers
    5 does: CLIP's other steps are always the same.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return build_engine(folder / "vocab.json", folder / "merges.txt", unk_token), {}
    content = read_json(file)
    try:
        model, added = content["model"], content.get("added_tokens") or []
        vocab = check_vocab(model["vocab"], file)
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
                  for merge in model["merges"]]
        declared = {str(token["id"]): token for token in added}
    except (AttributeError, KeyError, TypeError) as error:
        raise TinyldmError(f"{file} is not a tokenizer of byte pairs with a vocabulary and merges "
                           f"({type(error).__name__}: {error}): get it again") from None
    with engine_errors(f"{file} is not a tokenizer", "get it again"):
        return clip_engine(models.BPE(vocab, merges, unk_token=unk_token, end_of_word_suffix="</w>",
                                      continuing_subword_prefix="")), declared


def build_engine(vocab_file, merges_file, unk_token):
    """The same of vocab.json and merges.txt."""
    check_vocab(read_json(vocab_file), vocab_file)
    if not merges_file.exists():
        raise TinyldmError(f"{merges_file} is missing: a tokenizer folder holds vocab.json and "
                           "merges.txt, or tokenizer.json")
    with engine_errors(f"{merges_file} is not a list of merges for vocab.json", "get both again"):
        return clip_engine(models.BPE.from_file(
            str(vocab_file), str(merges_file), unk_token=unk_token, end_of_word_suffix="</w>",
            continuing_subword_prefix=""))


def check_vocab(vocab, file):
    if not all(type(number) is int and 0 <= number < 2**32 for number in vocab.values()):
        raise TinyldmError(f"{file} must give every token a whole number: get it again")
    return vocab


def clip_engine(model):
    """CLIP's steps around a vocabulary: clean, cut into words, write as bytes, join pairs."""
    engine = tokenizers.Tokenizer(model)
    engine.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    engine.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),    # keeps the words
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return engine


def read_added_tokens(file, special):
    """added_tokens.json, {token: id} -> as added_tokens_decoder: {id: the token and its flags}.

    special: the names of the special tokens. Source: transformers 5.24, PreTrainedTokenizerBase.
    """
    added = read_json(file)
    if not all(type(number) is int for number in added.values()):
        raise TinyldmError(f"{file} must give every token a whole number: get it again")
    return {str(number): {"content": name, "normalized": name not in special,
                          "special": name in special} for name, number in added.items()}


def add_declared_tokens(backend, declared, file):
    """Add the tokens that a folder lists by id, with their flags, from one of three files."""
    if not isinstance(declared, dict) or not all(
            number.isdecimal() and len(number) < 10 for number in declared):
        key = "added_tokens_decoder" if file.name == SETTINGS[0] else "the added tokens"
        raise TinyldmError(f"{file}: {key} must map ids to tokens: get it again")
    for number in sorted(declared, key=int):
        entry = declared[number]
        token = added_token(entry, isinstance(entry, dict) and entry.get("special", False), file)
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != int(number):
            raise TinyldmError(f"{file} gives token {token.content!r} the id {number}, the "
                               f"vocabulary {backend.token_to_id(token.content)}: get both again")


def add_special_tokens(backend, tokens, folder):
    """Recognise the special tokens in a text, as the published tokenizers do.

    An end token typed into a prompt is the end token, and "!" is Stable Diffusion 2's padding
    token. The flags that tokenizer.json or added_tokens_decoder give a token stay.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        if backend.token_to_id(token.content) is None:
            raise TinyldmError(f"{folder}: the vocabulary lacks the special token "
                               f"{token.content!r}: name another in special_tokens_map.json")
        if token.content not in known:
            backend.add_tokens([token])


def more_special_tokens(settings, file):
    """The special tokens beyond SPECIAL_TOKENS; those that no vocabulary has get the next ids."""
    found = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(key) or []
        if not isinstance(listed, (list, dict)):
            raise TinyldmError(f"{file}: {key} must be a list of tokens, not {listed!r:.80}: "
                               "correct or remove it")
        found += listed.values() if isinstance(listed, dict) else listed
    return found


def added_token(entry, special, place):
    """An AddedToken from what a file gives: its name, or a dict with "content" and flags."""
    if isinstance(entry, str):
        entry = {"content": entry, "normalized": False}
    if (not isinstance(entry, dict) or not isinstance(entry.get("content"), str)
            or not entry["content"].isprintable()):     # no surrogate, which the engine cannot take
        raise TinyldmError(f"{place}: a special token must be a string or have a \"content\", "
                           f"got {entry!r:.80}: correct {' or '.join(SETTINGS)}")
    flags = {flag: bool(entry[flag]) for flag in ("normalized", "lstrip", "rstrip", "single_word")
             if flag in entry}
    return AddedToken(entry["content"], special=bool(special), **flags)
