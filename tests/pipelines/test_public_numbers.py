"""Numbers that public test suites expect of the real weights, for those who have these weights.

TINYLDM_WEIGHTS names a folder with pipeline folders, named as on the hub, and with the public files
that the records name, under `inputs`:

    TINYLDM_WEIGHTS=~/weights python -m pytest tests/pipelines/test_public_numbers.py
                                        # ~/weights/
                                        # stable-diffusion-v1-4/  stable-diffusion-2/  ...
                                        # inputs/stable_diffusion_inpaint/input_bench_image.png ...

public_numbers.json is the table: what was drawn, a few of its numbers, their tolerance, and where
they are published. Pictures and arrays come from the data sets diffusers/test-arrays and
hf-internal-testing/diffusers-images on the hub and have their paths there; test_diffusion_ref is a
folder of finegrain-ai/refiners, in tests/e2e; LoRAs and embeddings are named as on the hub.

The numbers come from GPUs, whose convolutions may round to ten bits (TF32). A published tolerance
below GPU_DIGITS holds only on the same kind of GPU, so it is raised to GPU_DIGITS here. For whole
pictures the mean difference counts, as in refiners, because the largest one says more about the GPU
than about the code: 45 dB, and less where the source allows more or where the start differs a
little (a sample instead of a mean); or the cosine, where the source uses it. For float16 records
the table has twice the published tolerance. The last test makes such records of small random
weights with diffusers, to show that the tests pass and fail where they should.
"""
import json
import os
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.addons import WORD, kohya, make_lora, merge, vectors, write
from tests.support.pictures import hole
from tests.support.pictures import picture as patches
from tests.support.small_pipelines import inpainting, lcm, sd1, sdxl
from tinyldm import load_model
from tinyldm.images import open_image
from tinyldm.noise import A100_THREADS, CudaGenerator, get_generator
from tinyldm.pipelines.loading import load
from tinyldm.pipelines.stable_diffusion import StableDiffusion

PUBLISHED = Path(__file__).parents[1] / "support" / "public_numbers.json"
RECORDS = json.loads(PUBLISHED.read_text(encoding="utf-8"))
GPU_DIGITS = 1e-3
# Threads of the GPUs that larger noise may come from (noise.py): A100, V100, RTX 4090, H100.
GPUS = (A100_THREADS, 163840, 196608, 270336)
T4_THREADS = 40960          # newer tests, with small noise, may have run on this GPU
ADD_ONS = {"lora": StableDiffusion.load_lora, "embedding": StableDiffusion.load_textual_inversion}


def of_kind(kind):
    return pytest.mark.parametrize("record", RECORDS[kind], ids=itemgetter("id"))


def root():
    """The folder of weights; skips the test where there is none."""
    named = os.environ.get("TINYLDM_WEIGHTS")
    if not named:
        pytest.skip("TINYLDM_WEIGHTS names no folder of public weights")
    path = Path(named).expanduser()
    assert path.is_dir(), f"TINYLDM_WEIGHTS: there is no folder {path}"
    return path


def folder(record):
    """The folder of a record's weights; skips the test where there is none."""
    path = root() / record["weights"]
    if not path.is_dir():
        pytest.skip(f"TINYLDM_WEIGHTS holds no folder {record['weights']}")
    return path


def public(name):
    """A file that a record names; skips the test where there is none."""
    path = root() / "inputs" / name
    if not path.is_file():
        pytest.skip(f"TINYLDM_WEIGHTS holds no file inputs/{name}")
    return path


cached_load = lru_cache(maxsize=1)(load)


def states(record):
    """Draw a record -> the pipeline, and the latents (1,h,w,4) after every step."""
    path, images, latents = folder(record), {}, None
    add_ons = [(ADD_ONS[name], public(record[name])) for name in ADD_ONS.keys() & record.keys()]
    for name in {"image", "mask"} & record.keys():
        image = open_image(public(record[name]))
        images[name] = image.resize(record.get("resized", image.size))
    if "latents" in record:                             # drawn with other noise than the steps
        noise, shape = record["latents"]
        latents = get_generator(noise)(record["seed"]).randn(shape).transpose(0, 2, 3, 1)
    pipe = (load if add_ons else cached_load)(path)     # add-ons change the weights
    parts = {name: part for name, part in vars(pipe).items() if name != "schedule"}
    pipe = StableDiffusion(**parts | {"scheduler": pipe.scheduler | record.get("schedule", {})})
    for add, file in add_ons:
        add(pipe, file)
    steps = pipe.stream(record["prompt"], record.get("negative", ""), record["steps"],
                        record["guidance"], record["seed"], sampler=record["sampler"],
                        latents=latents, noise=record["noise"],
                        guidance_rescale=record.get("rescale", 0), strength=record.get("strength"),
                        **images)
    return pipe, [state.latents for state in steps]


def picture(record):
    """The picture (H,W,3) of a record, in [0, 1]."""
    pipe, latents = states(record)
    return pipe.decode(latents[-1])[0] / 2 + 0.5


def square(x, corner, side):
    """(...,H,W) -> (...,side,side) from a corner, its row and column; below 0 from the end."""
    row, column = corner
    return x[..., row:, column:][..., :side, :side]


def distance(found, record):
    """The distance of numbers from a record's, and the largest distance allowed."""
    found, expected = np.ravel(found), np.ravel(record["expected"])
    assert found.shape == expected.shape
    if "cosine" in record:
        lengths = np.linalg.norm(found) * np.linalg.norm(expected)
        return 1 - found @ expected / lengths, record["cosine"]
    if "psnr" in record:
        return np.square(found - expected).mean() ** 0.5, 10 ** (-record["psnr"] / 20)
    return abs(found - expected).max(), max(record["within"], GPU_DIGITS)


def check(results, record):
    """One of the results is the published one; several, if the source does not name its noise."""
    best = np.inf
    for result in results:
        found, allowed = distance(result, record)
        best = min(best, found)
        if best <= allowed:
            return
    pytest.fail(f"{record['id']}: {best:.2e} from what is published, allowed are {allowed:.0e} "
                f"({record['source']})")


def one(seed, shape, threads, which=-1):
    """One image of a GPU's noise: (1,H,W,C) for a shape (B,C,H,W), (1,M,D) for (B,M,D)."""
    noise = CudaGenerator(seed, threads).randn(shape)[[which]]
    return np.ascontiguousarray(np.moveaxis(noise, 1, -1)) if noise.ndim == 4 else noise


# ---- the kinds of records -------------------------------------------------------------------

@of_kind("drawings")
def test_drawings(record):
    """Nine pixels' blue of a picture; or three pixels' channels of latents, in torch's order."""
    def drawn(noise):
        if "state" in record:
            latents = states(record | {"noise": noise})[1][record["state"]]
            return latents.transpose(0, 3, 1, 2)[0, -3:, -3:, -1]
        return square(picture(record | {"noise": noise})[..., -1], record["slice"], 3)

    check(map(drawn, np.atleast_1d(record["noise"]).tolist()), record)


@of_kind("pictures")
def test_pictures(record):
    """Whole pictures, published as a picture or as an array."""
    folder(record)                                      # skip without the weights, first
    file = public(record["file"])
    published = np.load(file) if file.suffix == ".npy" else np.asarray(open_image(file)) / 255
    check([picture(record)], record | {"expected": published})


@of_kind("text")
def test_text(record):
    """The first and last three numbers of some rows of the context."""
    context, = cached_load(folder(record)).encode_prompt(record["prompt"])      # (77,D)
    found = [[*context[int(row), :3], *context[int(row), -3:]] for row in record["rows"]]
    check([found], record | {"expected": list(record["rows"].values())})


@of_kind("unet")
def test_unet(record):
    """One call with a GPU's noise as latents and context; only the last image of a batch."""
    unet = load_model(folder(record) / "unet")

    def result(threads):
        latents, context = (one(record["seed"], record[name], threads)
                            for name in ("latents", "context"))
        output = unet(latents, np.float32([record["timestep"]]), context)
        return output.transpose(0, 3, 1, 2)[-1, -2:, -2:, :2]

    check(map(result, GPUS), record)


@of_kind("vae")
def test_vae(record):
    """A GPU's noise, decoded; or encoded, and perhaps the mean or a sample decoded again."""
    vae, what, seed = load_model(folder(record) / "vae"), record["what"], record["seed"]

    def result(own_threads, threads):
        which = 0 if what == "sample" else -1
        x = one(seed, record["shape"], threads, which)
        if what != "decode":
            x, logvar = vae.encode(x)
            if what != "mode":
                _, h, w, C = x.shape
                noise = one(seed, (record["shape"][0], C, h, w), own_threads, which)
                x = x + np.exp(logvar / 2) * noise
        if what == "sample":
            return square(x[0, ..., -1], record["slice"], 3)
        return square(vae.decode(x).transpose(0, 3, 1, 2)[0, -2:], record["slice"], 2)

    own = (A100_THREADS, T4_THREADS) if what == "decoded sample" else (A100_THREADS,)
    check((result(a, b) for a in own for b in GPUS), record)


# ---- the same tests on records made here ----------------------------------------------------

FEW_THREADS = 500           # instead of the T4's: the small models' noise is larger


def drawn_by_diffusers(pipe, seed=0, **options):
    """-> latents after every step [(1,4,h,w)], picture (H,W,3) in [0, 1]."""
    states = []

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"].numpy())
        return {}

    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": "a red cat", "num_inference_steps": 3, "guidance_scale": 7.5} | options
    image, = pipe(generator=torch.Generator().manual_seed(seed), output_type="np",
                  callback_on_step_end=keep, **options).images
    return states, image


def small_drawings(root):
    """{name: (test, record)} of drawings by diffusers with the small pipelines in a folder."""
    inputs = root / "inputs"
    inputs.mkdir()
    image, mask = patches(), hole()
    image.save(inputs / "picture.png")
    mask.save(inputs / "mask.png")
    resized = image.resize((64, 48)), mask.resize((64, 48))
    numpy = {"latents": torch.from_numpy(
        np.random.RandomState(0).standard_normal((1, 4, 8, 8))).float()}
    editing = {"image": "picture.png", "resized": [64, 48], "strength": 0.5, "slice": [20, 30]}
    painting = editing | {"mask": "mask.png"}

    first = diffusers.StableDiffusionPipeline.from_pretrained(root / "sd1")
    others = {
        "lcm": diffusers.LatentConsistencyModelPipeline.from_pretrained(root / "lcm"),
        "inpainting": diffusers.StableDiffusionInpaintPipeline.from_pretrained(root / "inpainting"),
        "sdxl": diffusers.StableDiffusionXLPipeline.from_pretrained(root / "sdxl")}

    def plain(pipe, scheduler=None, **config):
        """The first pipeline's parts in another pipeline, or with another scheduler."""
        scheduler = scheduler and scheduler.from_config(first.scheduler.config, **config)
        parts = first.components | ({"scheduler": scheduler} if scheduler else {})
        return pipe(**parts, requires_safety_checker=False)

    def drawing(pipe, options, weights="sd1", **record):
        record = {"weights": weights, "prompt": "a red cat", "sampler": "pndm", "steps": 3,
                  "guidance": 7.5, "noise": "torch-cpu", "seed": 0, "slice": [-3, -3]} | record
        states, drawn = drawn_by_diffusers(pipe, **options)
        if "state" in record:
            return test_drawings, record | {
                "expected": states[record["state"]][0, -3:, -3:, -1].tolist()}
        if "file" not in record:
            row, column = record["slice"]
            rows = slice(row, row + 3 or None), slice(column, column + 3 or None)
            return test_drawings, record | {"expected": drawn[(*rows, -1)].tolist()}
        file = inputs / record["file"]
        if file.suffix == ".npy":
            np.save(file, drawn)
        else:
            Image.fromarray((drawn * 255).round().astype(np.uint8)).save(file)
        return test_pictures, record

    with_lora, with_word = (diffusers.StableDiffusionPipeline.from_pretrained(root / "sd1")
                            for _ in range(2))
    pairs = make_lora(with_lora, "attn")
    write(kohya(pairs), inputs / "lora.safetensors")
    merge(with_lora, pairs, 1.0)
    torch.save({WORD: vectors()}, inputs / "learned_embeds.bin")
    with_word.load_textual_inversion(inputs / "learned_embeds.bin")
    text_to_image = diffusers.StableDiffusionPipeline
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
                "prediction_type": "v_prediction"}
    return {
        "picture": drawing(first, numpy, noise="numpy"),
        "latents": drawing(first, numpy, noise="numpy", state=1),
        "dpm": drawing(plain(text_to_image, diffusers.DPMSolverMultistepScheduler,
                             final_sigmas_type="sigma_min"), numpy, noise="numpy",
                       sampler="dpmpp_2m", schedule={"final_sigmas_type": "sigma_min"}),
        "zero snr": drawing(plain(text_to_image, diffusers.DDIMScheduler, **zero_snr),
                            {"guidance_rescale": 0.7}, sampler="ddim", schedule=zero_snr,
                            rescale=0.7),
        "one of two noises": drawing(first, {}, noise=["numpy", "torch-cpu"]),
        "whole picture": drawing(first, {}, file="picture-3.png", psnr=45),
        "whole array": drawing(first, {}, file="picture-3.npy", cosine=1e-4),
        "image to image": drawing(plain(diffusers.StableDiffusionImg2ImgPipeline),
                                  {"image": resized[0], "strength": 0.5}, **editing),
        "inpainting": drawing(plain(diffusers.StableDiffusionInpaintPipeline),
                              {"image": resized[0], "mask_image": resized[1], "strength": 0.5,
                               "height": 48, "width": 64}, **painting),
        "inpainting, nine channels": drawing(
            others["inpainting"], {"image": resized[0], "mask_image": resized[1], "height": 48,
                                   "width": 64}, "inpainting", sampler=None,
            **painting | {"strength": 1.0}),
        "lcm": drawing(others["lcm"], numpy, "lcm", sampler=None,
                       latents=["numpy", [1, 4, 8, 8]]),
        "sdxl": drawing(others["sdxl"], {"negative_prompt": "low"}, "sdxl", sampler="euler",
                        negative="low"),
        "lora": drawing(with_lora, {}, lora="lora.safetensors", cosine=1e-4),
        "embedding": drawing(with_word, {"prompt": f"a {WORD}"}, prompt=f"a {WORD}",
                             embedding="learned_embeds.bin")}


def small_calls(root):
    """The same for single calls of the models."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(root / "sd1")
    context, _ = pipe.encode_prompt("a red cat", "cpu", 1, False)
    rows = {str(row): [*context[0, row, :3].tolist(), *context[0, row, -3:].tolist()]
            for row in (0, 76)}
    noise, text, images = (CudaGenerator(5).randn(shape)
                           for shape in [(4, 4, 8, 8), (4, 77, 32), (4, 3, 64, 64)])
    x = torch.from_numpy
    output = pipe.unet(x(noise), 4, x(text)).sample
    posterior = pipe.vae.encode(x(images)).latent_dist
    sample, newer_sample = (
        posterior.mean + posterior.std * x(CudaGenerator(5, threads).randn((4, 4, 8, 8)))
        for threads in (A100_THREADS, FEW_THREADS))

    def decoded(latents):
        return pipe.vae.decode(latents).sample[-1, -2:]

    def vae(what, shape, corner, expected):
        return test_vae, {"weights": "sd1", "what": what, "seed": 5, "shape": shape,
                          "slice": corner, "expected": expected.tolist()}

    return {
        "text": (test_text, {"weights": "sd1", "prompt": "a red cat", "rows": rows}),
        "unet": (test_unet, {
            "weights": "sd1", "seed": 5, "latents": [4, 4, 8, 8], "context": [4, 77, 32],
            "timestep": 4, "expected": output[-1, -2:, -2:, :2].tolist()}),
        "vae decode": vae("decode", [4, 4, 8, 8], [0, -2], decoded(x(noise))[:, :2, -2:]),
        "vae mode": vae("mode", [4, 3, 64, 64], [-2, 0], decoded(posterior.mean)[:, -2:, :2]),
        "vae decoded sample": vae("decoded sample", [4, 3, 64, 64], [-2, 0],
                                  decoded(newer_sample)[:, -2:, :2]),
        "vae sample": vae("sample", [4, 3, 64, 64], [-3, -3], sample[0, -1, -3:, -3:])}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """-> a folder of small weights, and records made with them."""
    root = tmp_path_factory.mktemp("weights")
    for make in (sd1, lcm, inpainting, sdxl):
        make(root / make.__name__)
    with torch.no_grad():
        return root, small_drawings(root) | small_calls(root)


def shifted(record):
    """A record with one number off by three tolerances; of a whole picture, with another seed."""
    if "file" in record:
        return record | {"seed": 1}
    if "rows" in record:
        return record | {"rows": record["rows"] | {"76": wrong(record["rows"]["76"], record)}}
    return record | {"expected": wrong(record["expected"], record)}


def wrong(expected, record):
    expected = np.array(expected)
    expected.reshape(-1)[-1] += 0.3 if "cosine" in record else 3 * record["within"]
    return expected.tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [
    "picture", "latents", "dpm", "zero snr", "one of two noises", "whole picture", "whole array",
    "image to image", "inpainting", "inpainting, nine channels", "lcm", "sdxl", "lora",
    "embedding", "text", "unet", "vae decode", "vae mode", "vae decoded sample", "vae sample"])
def test_the_tests(name, small, monkeypatch):
    root, records = small
    test, record = records[name]
    record = {"id": name, "within": 1e-3, "source": "diffusers"} | record
    monkeypatch.delenv("TINYLDM_WEIGHTS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="TINYLDM_WEIGHTS names no folder"):
        test(record)
    monkeypatch.setenv("TINYLDM_WEIGHTS", str(root))
    monkeypatch.setitem(globals(), "T4_THREADS", FEW_THREADS)
    test(record)
    with pytest.raises(pytest.fail.Exception, match=f"^{name}: .* from what is published"):
        test(shifted(record))
    with pytest.raises(pytest.skip.Exception, match="holds no folder elsewhere"):
        test(record | {"weights": "elsewhere"})
    for key in {"image", "mask", "lora", "embedding", "file"} & record.keys():
        with pytest.raises(pytest.skip.Exception, match="holds no file inputs/a/b.png"):
            test(record | {key: "a/b.png"})
