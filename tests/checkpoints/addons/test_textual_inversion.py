"""Textual inversions: prompts and pictures against diffusers with the same files."""
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import tinyldm
from tests.support import small_pipelines, strict
from tests.support.addons import WORD, vectors, write
from tests.support.drawing import STEPS, Reference, assert_same_pictures
from tests.support.tolerance import assert_close
from tinyldm.checkpoints import add_word, load_model, save_model
from tinyldm.checkpoints.addons.textual_inversion import vectors_of
from tinyldm.errors import TinyldmError
from tinyldm.models import CLIPTextModel, CLIPTextModelWithProjection
from tinyldm.pipelines.loading import load
from tinyldm.text import prompt, tokenizer

TEXTS = [f"a photo of {WORD} riding a horse", f"{WORD}{WORD}, red", f"on{WORD}s", f"{WORD}_1", "",
         "red cat <Cat-Toy> low"]


@pytest.fixture
def pipe(folder):
    return load(folder)


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return small_pipelines.sdxl(tmp_path_factory.mktemp("xl"))


def web_interface(rows, **more):
    """As AUTOMATIC1111 writes it."""
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": WORD,
            "step": 1500, "sd_checkpoint": "7460a6fa", "sd_checkpoint_name": "v1-5", **more}


FILES = {
    "diffusers": ("a.safetensors", {WORD: vectors()}),
    "diffusers, pickled": ("learned_embeds.bin", {WORD: vectors()}),
    "diffusers, one vector without its axis": ("learned_embeds.bin", {WORD: vectors()[0]}),
    "diffusers, one vector": ("a.safetensors", {WORD: vectors(1)}),
    "diffusers, one vector, capitals": ("a.safetensors", {WORD.title(): vectors(1)}),
    "web interface": ("a.pt", web_interface(vectors())),
    "web interface, trained": ("a.pt", web_interface(vectors().requires_grad_())),
}


# ---- against diffusers ----------------------------------------------------------------------

@pytest.mark.parametrize("kind", FILES)
def test_prompts_are_read_as_by_diffusers(kind, pipe, reference, tmp_path):
    name, content = FILES[kind]
    file = write(content, tmp_path / name)
    pipe.load_textual_inversion(file)
    reference.pipe.load_textual_inversion(file)
    table = reference.pipe.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(
        pipe.text_encoder.text_model.embeddings.token_embedding.weight.data, table)
    for text in TEXTS:
        converted = reference.pipe.maybe_convert_prompt(text, reference.pipe.tokenizer)
        if WORD in text or "one vector" in kind:        # diffusers expands no word with capitals
            ids = reference.pipe.tokenizer(converted, add_special_tokens=False).input_ids
            assert pipe.tokenizer.ids(text) == ids, text
    context, _ = reference.pipe.encode_prompt(TEXTS[0], "cpu", 1, False)
    assert_close(pipe.encode_prompt(TEXTS[0]), context.detach().numpy(), 1e-4)


def test_several_words_in_a_picture(pipe, reference, original, tmp_path):
    text, negative = f"{WORD}, a horse, fast", "ugly-v2 red"
    files = [write(FILES["diffusers"][1], tmp_path / "a.safetensors"),
             write(web_interface(2 * vectors(5), name="ugly-v2"), tmp_path / "b.pt")]
    for file in files:
        pipe.load_textual_inversion(file)
        reference.pipe.load_textual_inversion(file)
    image, = pipe(text, negative, num_inference_steps=STEPS, seed=3)
    _, theirs = reference([3], prompt=text, negative_prompt=negative)
    assert_same_pictures(np.asarray(image)[None], theirs)
    _, without = original([3], prompt=text, negative_prompt=negative)
    assert abs(theirs.astype(int) - without).mean() > 2, "the words say nothing"


def test_stable_diffusion_xl(tmp_path):
    folder, pair = small_pipelines.sdxl(tmp_path / "xl"), tmp_path / "pot.safetensors"
    rows = write({"clip_l": vectors(2, 16), "clip_g": vectors(2, 24)}, pair)
    reference, pipe = Reference(folder), load(folder)
    pipe.load_textual_inversion(rows, WORD)
    for name, end in [("clip_l", ""), ("clip_g", "_2")]:
        reference.pipe.load_textual_inversion(
            safetensors.torch.load_file(pair)[name], token=WORD,
            text_encoder=getattr(reference.pipe, f"text_encoder{end}"),
            tokenizer=getattr(reference.pipe, f"tokenizer{end}"))
    image, = pipe(TEXTS[0], num_inference_steps=STEPS, guidance_scale=7.5, seed=3)
    _, theirs = reference([3], prompt=TEXTS[0], guidance_scale=7.5)
    assert_same_pictures(np.asarray(image)[None], theirs)


def test_another_word_than_the_files(pipe, reference, tmp_path):
    file = write(FILES["diffusers"][1], tmp_path / "a.safetensors")
    pipe.load_textual_inversion(file, "my-toy")
    reference.pipe.load_textual_inversion(file, token="my-toy")
    for text in ("a my-toy", WORD):
        converted = reference.pipe.maybe_convert_prompt(text, reference.pipe.tokenizer)
        ids = reference.pipe.tokenizer(converted, add_special_tokens=False).input_ids
        assert pipe.tokenizer.ids(text) == ids


L, G = vectors(2, 16), vectors(2, 24)                   # for the small SDXL's two encoders
BOTH = {
    "clip_l and clip_g": {"clip_l": L, "clip_g": G},
    "text_encoder and text_encoder_2": {"text_encoder": L, "text_encoder_2": G},
    "te1 and te2": {"te2": G, "te1": L},
    "text_encoders_0 and _1, of diffusers' training": {"text_encoders_0": L, "text_encoders_1": G},
    "emb_params with their encoders": {"clip_l.emb_params": L, "clip_g.emb_params": G},
    "emb_params, numbered": {"emb_params": G, "emb_params_2": L},
    "the word in front": {"xq-toy.clip_l": L, "xq-toy.clip_g": G},
    "any names": {"one": G, "two": L},
    "the web interface's": web_interface({"clip_g": G, "clip_l": L}, name="xq-toy")}


@pytest.mark.parametrize("kind, ending", [
    (kind, ending) for kind in BOTH for ending in ("safetensors", "pt")
    if ending == "pt" or "string_to_param" not in BOTH[kind]])      # only a pickle nests dicts
def test_both_encoders_under_every_name(kind, ending, xl_folder, tmp_path):
    """Their widths tell the encoders apart."""
    pipe = load(xl_folder)
    first = len(pipe.tokenizer)
    pipe.load_textual_inversion(write(BOTH[kind], tmp_path / f"xq-toy.{ending}"))
    for tokenizer_, model, rows in [(pipe.tokenizer, pipe.text_encoder, L),
                                    (pipe.tokenizer_2, pipe.text_encoder_2, G)]:
        assert tokenizer_.ids("xq-toy") == [first, first + 1]
        table = model.text_model.embeddings.token_embedding.weight.data
        np.testing.assert_array_equal(table[first:], rows)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_the_two_files_that_diffusers_writes(ending, xl_folder, tmp_path):
    """Its training script for SDXL: both have the word as their tensor's name."""
    pipe = load(xl_folder)
    first = len(pipe.tokenizer)
    write({WORD: G}, tmp_path / f"learned_embeds_2.{ending}")
    pipe.load_textual_inversion(write({WORD: L}, tmp_path / f"learned_embeds.{ending}"))
    for tokenizer_, model, rows in [(pipe.tokenizer, pipe.text_encoder, L),
                                    (pipe.tokenizer_2, pipe.text_encoder_2, G)]:
        assert tokenizer_.ids(WORD) == [first, first + 1]
        table = model.text_model.embeddings.token_embedding.weight.data
        np.testing.assert_array_equal(table[first:], rows)


@pytest.mark.parametrize("names", [("clip_g", "clip_l"), ("te2", "te1"),
                                   ("text_encoder_2", "text_encoder")])
def test_encoders_of_one_width_are_told_apart_by_their_names(names):
    first, second = (SimpleNamespace(shape=(2, 8)) for _ in range(2))
    found = vectors_of("a", dict(zip(names, (first, second))),
                       {"text_encoder": 8, "text_encoder_2": 8})
    assert found == {"text_encoder_2": first, "text_encoder": second}
    with pytest.raises(TinyldmError, match="is no textual inversion"):
        vectors_of("a", {"one": first, "two": second}, {"text_encoder": 8, "text_encoder_2": 8})


@pytest.mark.parametrize("content, message", [
    ({WORD: L}, "vectors for 1 text encoders, but this model has 2"),
    ({"clip_g": G}, "vectors for 1 text encoders"),
    ({"clip_l": L, "clip_g": L}, "width 16.*width 24"),
    ({"clip_l": L, "clip_g": G, "clip_x": L}, "is no textual inversion: .* found 3"),
    ({"clip_l": L, "clip_g": G[None]}, "is no textual inversion"),
    ({"clip_l": L, "clip_g": G[:0]}, "is no textual inversion"),
    ({"clip_l": L, "clip_g": G / 0}, "clip_g holds NaN")])
def test_what_does_not_fit_both_encoders(content, message, xl_folder, tmp_path):
    pipe = load(xl_folder)
    before = len(pipe.tokenizer), len(pipe.tokenizer_2)
    with pytest.raises(TinyldmError, match=message):
        pipe.load_textual_inversion(write(content, tmp_path / "xq-toy.safetensors"))
    assert (len(pipe.tokenizer), len(pipe.tokenizer_2)) == before


# ---- what diffusers does not do -------------------------------------------------------------

@pytest.mark.parametrize("name, content", [
    ("xq-style.safetensors", {"emb_params": vectors()}),
    ("xq-style.safetensors", {"string_to_param.*": vectors()}),
    ("xq-style.safetensors", {"*": vectors()}), ("xq-style.safetensors", {"clip_l": vectors()}),
    ("xq-style.pt", web_interface(vectors(), name=None)),
    ("xq-style.pt", {key: value for key, value in web_interface(vectors()).items()
                     if key != "name"})])
def test_a_file_without_a_word_is_called_as_it_is_named(name, content, pipe, tmp_path):
    first = len(pipe.tokenizer)
    pipe.load_textual_inversion(write(content, tmp_path / name))
    assert pipe.tokenizer.ids("xq-style") == [first, first + 1, first + 2]
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight
    np.testing.assert_array_equal(table.data[first:], vectors().numpy())


def test_capitals_make_no_difference(pipe, tmp_path):
    first = len(pipe.tokenizer)
    pipe.load_textual_inversion(write({"Xq-Style": vectors()}, tmp_path / "a.safetensors"))
    for text in ("Xq-Style", "xq-style", "XQ-STYLE"):
        assert pipe.tokenizer.ids(text) == [first, first + 1, first + 2]


def test_weights_and_chunks_count_every_vector(pipe, tmp_path):
    first = len(pipe.tokenizer)
    pipe.load_textual_inversion(write({WORD: vectors()}, tmp_path / "a.safetensors"))
    chunk, = prompt.split_into_chunks(f"a ({WORD}:1.2) [{WORD}]", pipe.tokenizer)
    ids = [first, first + 1, first + 2]
    assert chunk[1:] == [*((i, 1.2) for i in ids), *((i, 1 / 1.1) for i in ids)]
    with pytest.warns(UserWarning, match="is read in 2 chunks"):
        context = pipe.encode_prompt(f"({WORD}:1.1)" * 26)
    assert context.shape == (1, 154, 32) and np.isfinite(context).all()


def test_a_table_that_is_larger_than_the_vocabulary(pipe, folder, tmp_path):
    """Words use the rows that belong to no token; when none is left, the table grows."""
    model, first = pipe.text_encoder, len(pipe.tokenizer)
    table = model.text_model.embeddings.token_embedding.weight
    spare = np.zeros((4, 32), np.float32)
    table.data = np.concatenate([table.data, spare])
    table.shape = table.data.shape
    for i, size in enumerate([4, 5]):
        pipe.load_textual_inversion(write({f"xq-{i}": vectors()}, tmp_path / f"{i}.safetensors"))
        start = first + 3 * i
        assert table.shape == table.data.shape == (first + max(size - 1 + i * 2, 4), 32)
        np.testing.assert_array_equal(table.data[start:start + 3], vectors().numpy())
    assert model.config["vocab_size"] == first + 6


def test_the_models_changed_are_saved_and_read(pipe, tmp_path):
    pipe.load_textual_inversion(write({WORD: vectors()}, tmp_path / "a.safetensors"))
    save_model(pipe.text_encoder, tmp_path / "text_encoder", np.float32)
    again, ids = load_model(tmp_path / "text_encoder"), pipe.tokenizer(WORD)
    np.testing.assert_array_equal(again(ids), pipe.text_encoder(ids))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_on_a_device(dtype, folder, tmp_path):
    file = write({WORD: vectors()}, tmp_path / "a.safetensors")
    with strict.installed():
        pipe = load(folder, "cuda", dtype)
        pipe.load_textual_inversion(file)
        table = pipe.text_encoder.text_model.embeddings.token_embedding.weight.data
        assert isinstance(table, strict.Array) and table.dtype == dtype
        np.testing.assert_array_equal(table.get()[-3:], vectors().numpy().astype(dtype))


def test_both_text_encoders_of_sdxl(folder, tmp_path):
    def encoder(build, width):
        config = {"vocab_size": V, "hidden_size": width, "intermediate_size": width,
                  "num_hidden_layers": 1, "num_attention_heads": 1, "projection_dim": width}
        model = build(config)
        for parameter in model.parameters():
            parameter.data = np.zeros(parameter.shape, np.float32)
        return model

    words = [tokenizer.Tokenizer.from_folder(folder / "tokenizer") for _ in range(2)]
    V = len(words[0])
    encoders = {"text_encoder": (words[0], encoder(CLIPTextModel, 8)),
                "text_encoder_2": (words[1], encoder(CLIPTextModelWithProjection, 12))}
    pair = {"clip_g": vectors(2, 12), "clip_l": vectors(2, 8)}
    with pytest.raises(TinyldmError, match="vectors for 1 text encoders, but this model has 2"):
        add_word(encoders, write({WORD: vectors(2, 8)}, tmp_path / "one.safetensors"))
    with pytest.raises(TinyldmError, match="width 8.*width 12"):
        add_word(encoders, write(pair | {"clip_g": vectors(2, 8)}, tmp_path / "xq.safetensors"))
    assert len(words[0]) == len(words[1]) == V
    add_word(encoders, write(pair, tmp_path / "xq.safetensors"))
    for (words, model), rows in zip(encoders.values(), (pair["clip_l"], pair["clip_g"])):
        assert words.ids("xq") == [V, V + 1]
        table = model.text_model.embeddings.token_embedding.weight.data
        np.testing.assert_array_equal(table[V:], rows.numpy())


# ---- what is refused ------------------------------------------------------------------------

BAD = [
    ("a.safetensors", {WORD: vectors(2, 768)}, "made for Stable Diffusion 1 .text encoder of width "
                                               "768., but this is a model .* of width 32"),
    ("a.pt", web_interface(vectors(2, 1024)), "made for Stable Diffusion 2 .* of width 1024"),
    ("a.safetensors", {"clip_l": vectors(2, 768), "clip_g": vectors(2, 1280)},
     "has vectors for 2 text encoders, but this model has 1"),
    ("a.safetensors", {"lo": vectors()}, "'lo' is a token of the vocabulary already"),
    ("lo.safetensors", {"emb_params": vectors()}, "'lo' is a token of the vocabulary"),
    ("a.safetensors", {"<|endoftext|>": vectors()}, "'<|endoftext|>' is a token"),
    ("a.safetensors", {" ": vectors()}, "a new word must have a letter or sign, got ' '"),
    ("a.safetensors", {}, "is no textual inversion: .* found none"),
    ("a.safetensors", {"lora_unet_a.lora_up.weight": vectors(), "b": vectors()},
     "is no textual inversion but of the kind LoRA: expected"),
    ("a.safetensors", {"a": vectors(), "b": vectors(2)}, r"found 2: a \[3, 32\], b \[2, 32\]"),
    ("a.safetensors", {WORD: vectors()[None]}, r"is no textual inversion: .* \[1, 3, 32\]"),
    ("a.safetensors", {WORD: torch.tensor(1.0)}, "is no textual inversion"),
    ("a.safetensors", {WORD: vectors()[:0]}, "is no textual inversion"),
    ("a.safetensors", {WORD: vectors() / 0}, f"{WORD} holds NaN, infinity"),
    ("a.safetensors", {WORD: torch.ones(2, 32, dtype=torch.int32)}, "has dtype I32"),
    ("a.pt", web_interface({"*": vectors()}), "is no textual inversion"),
    ("a.pt", web_interface(vectors(), string_to_param={}), "is no textual inversion"),
    ("a.pt", vectors(), "must hold tensors by name"),
    ("a.pt", {"string_to_param": torch.nn.ParameterDict({"*": vectors()})}, "a.pt"),
    ("a.pt", {WORD: SimpleNamespace()}, "SimpleNamespace"),
]


@pytest.mark.parametrize("name, content, message", BAD)
def test_what_does_not_fit_is_refused_and_changes_nothing(name, content, message, pipe, tmp_path):
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight
    before = table.data, table.shape, len(pipe.tokenizer), pipe.text_encoder.config["vocab_size"]
    with pytest.raises(TinyldmError, match=message) as error:
        pipe.load_textual_inversion(write(content, tmp_path / name))
    assert "\n" not in str(error.value)
    after = table.data, table.shape, len(pipe.tokenizer), pipe.text_encoder.config["vocab_size"]
    assert after[0] is before[0] and after[1:] == before[1:]


def test_a_pipeline_that_learned_a_word_is_not_saved(pipe, tmp_path):
    pipe.load_textual_inversion(write({"<pot>": vectors(2)}, tmp_path / "pot.safetensors"))
    with pytest.raises(TinyldmError, match=r"cannot be saved with a pipeline \(<pot>\): save it"):
        tinyldm.save(pipe, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_word_is_learned_once(pipe, tmp_path):
    file = write({WORD: vectors()}, tmp_path / "a.safetensors")
    pipe.load_textual_inversion(file)
    for word in (None, f"{WORD}_2", WORD.upper(), 5, "\udcff"):
        with pytest.raises(TinyldmError, match="already|must be a string of valid Unicode"):
            pipe.load_textual_inversion(file, word)
    pipe.load_textual_inversion(file, "xq_1")
    with pytest.raises(TinyldmError, match="'xq_1' is a token"):
        pipe.load_textual_inversion(file, "xq")


def test_parts_of_two_pipelines(pipe, tmp_path):
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight
    table.data = table.data[:-1]
    with pytest.raises(TinyldmError, match=f"tokenizer knows {table.shape[0]} tokens, the text .* "
                                           f"{table.shape[0] - 1}: use parts of one"):
        pipe.load_textual_inversion(write({WORD: vectors()}, tmp_path / "a.safetensors"))
