"""LoCon, LoHa, LoKr, differences: against LyCORIS' formulas in torch, and peft's own modules."""
import peft
import pytest
import torch

from tests.support import strict
from tests.support.addons import (
    PARTS,
    assert_same_weights,
    kohya,
    make_lora,
    merge,
    public,
    weights,
    write,
)
from tests.support.drawing import Reference
from tests.support.tolerance import assert_allclose
from tinyldm.pipelines.loading import load

RANK, ALPHA = 2, 3.0


@pytest.fixture
def reference(small_folder):
    return Reference(small_folder).pipe.to(torch.float32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape) * 0.5


def factors(size):
    """The nearest two numbers of a product; the small one first."""
    small = max(n for n in range(1, int(size ** 0.5) + 1) if size % n == 0)
    return small, size // small


# ---- each kind: a weight's shape -> its tensors, what torch makes of them, its rank ------------

def locon(O, C, *K):
    """A convolution to RANK channels, one of 3x3 among them, and one to O channels."""
    up, down = normal(O, RANK, 1, 1), normal(RANK, C, 1, 1)
    mid = normal(RANK, RANK, *(K or (1, 1)))
    rebuilt = torch.einsum("ijkl,pi,jr->prkl", mid, up[:, :, 0, 0], down[:, :, 0, 0])
    return {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid}, rebuilt, RANK


def loha(O, C, *K):
    N = C * torch.Size(K).numel()
    a, b, c, d = normal(O, RANK), normal(RANK, N), normal(O, RANK), normal(RANK, N)
    return ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}, (a @ b) * (c @ d),
            RANK)


def loha_tucker(O, C, *K):
    K = K or (1, 1)
    tensors, rebuilt = {}, 1
    for i in "12":
        t, a, b = normal(RANK, RANK, *K), normal(RANK, O), normal(RANK, C)
        tensors |= {f"hada_t{i}": t, f"hada_w{i}_a": a, f"hada_w{i}_b": b}
        rebuilt = rebuilt * torch.einsum("ijkl,jr,ip->prkl", t, b, a)
    return tensors, rebuilt, RANK


def lokr(first, second):
    """first, second: "whole", "product" or "tucker"; two whole ones are never scaled."""
    def build(O, C, *K):
        (a, c), (b, d), K = factors(O), factors(C), K or (1, 1)
        tensors, w1, w2 = {}, normal(a, b), normal(c, d, *K)
        if first == "product":
            left, right = normal(a, RANK), normal(RANK, b)
            tensors, w1 = {"lokr_w1_a": left, "lokr_w1_b": right}, left @ right
        if second == "product":
            left, right = normal(c, RANK), normal(RANK, d * K[0] * K[1])
            tensors |= {"lokr_w2_a": left, "lokr_w2_b": right}
            w2 = (left @ right).reshape(c, d, *K)
        if second == "tucker":
            t, left, right = normal(RANK, RANK, *K), normal(RANK, c), normal(RANK, d)
            tensors |= {"lokr_t2": t, "lokr_w2_a": left, "lokr_w2_b": right}
            w2 = torch.einsum("ijkl,ip,jr->prkl", t, left, right)
        tensors |= {"lokr_w1": w1} if first == "whole" else {}
        tensors |= {"lokr_w2": w2} if second == "whole" else {}
        return (tensors, torch.kron(w1[:, :, None, None].contiguous(), w2.contiguous()),
                None if first == second == "whole" else RANK)
    return build


def difference(*shape):
    tensor = normal(*shape)
    return {"diff": tensor}, tensor, None


KINDS = {"LoCon, Tucker": locon, "LoHa": loha, "LoHa, Tucker": loha_tucker,
         "difference": difference,
         **{f"LoKr, {first} and {second}": lokr(first, second) for first in ("whole", "product")
            for second in ("whole", "product", "tucker")}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_layer(kind, small_folder, reference, tmp_path):
    """Of all matrices and convolutions, of the UNet and of the text encoder."""
    tensors = {}
    with torch.no_grad():
        for part, prefix in PARTS.items():
            for name, layer in getattr(reference, part).named_modules():
                if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                    shape = layer.weight.shape
                    if "tucker" in kind.lower() and len(shape) == 2:
                        continue                        # it is for convolutions
                    own, change, rank = KINDS[kind](*shape)
                    flat = prefix + public(part, name).replace(".", "_")
                    tensors |= {f"{flat}.{end}": tensor for end, tensor in own.items()}
                    tensors[f"{flat}.alpha"] = torch.tensor(ALPHA)
                    scale = ALPHA / rank if rank else 1
                    layer.weight += 0.7 * scale * change.reshape(shape)
    pipe = load(small_folder)
    pipe.load_lora(write(tensors, tmp_path / "style.safetensors"), 0.7)
    assert_same_weights(pipe, reference)


def test_biases_and_norms(small_folder, reference, tmp_path, recwarn):
    """LyCORIS trains the norms as differences, and its "full" kind trains biases, too."""
    tensors = {}
    with torch.no_grad():
        for part, prefix in PARTS.items():
            for name, layer in getattr(reference, part).named_modules():
                norm = isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm))
                flat = prefix + public(part, name).replace(".", "_")
                if norm:
                    tensors[f"{flat}.w_norm"] = change = normal(*layer.weight.shape)
                    layer.weight += 0.7 * change
                if norm or isinstance(layer, torch.nn.Conv2d):
                    tensors[f"{flat}.{'b_norm' if norm else 'diff_b'}"] = change = normal(
                        *layer.bias.shape)
                    layer.bias += 0.7 * change
    pipe = load(small_folder)
    pipe.load_lora(write(tensors, tmp_path / "style.safetensors"), 0.7)
    assert_same_weights(pipe, reference)
    assert len(tensors) > 60 and not recwarn.list


def test_the_kinds_mix_in_a_file_and_on_a_layer(small_folder, reference, tmp_path):
    pairs = make_lora(reference, "attn")
    tensors = kohya(pairs)
    merge(reference, pairs, 1)
    (part, name), _ = next(iter(pairs.items()))
    more, change, _ = difference(*getattr(reference, part).get_submodule(name).weight.shape)
    tensors |= {f"{PARTS[part]}{name.replace('.', '_')}.{end}": tensor
                for end, tensor in more.items()}
    with torch.no_grad():
        getattr(reference, part).get_submodule(name).weight += change
    pipe = load(small_folder)
    pipe.load_lora(write(tensors, tmp_path / "style.safetensors"))
    assert_same_weights(pipe, reference)


@pytest.mark.parametrize("kind", ["LoCon, Tucker", "LoHa, Tucker", "LoKr, product and tucker"])
def test_on_a_device(kind, small_folder, tmp_path):
    tensors, _, _ = KINDS[kind](8, 4, 3, 3)
    file = write({f"lora_unet_conv_in.{end}": tensor for end, tensor in tensors.items()},
                 tmp_path / "style.safetensors")
    host = load(small_folder)
    before = weights(host)["unet", "conv_in.weight"]
    host.load_lora(file, 0.5)
    after = weights(host)["unet", "conv_in.weight"]
    assert abs(after - before).max() > 0.05
    with strict.installed():
        device = load(small_folder, "cuda", "float32")
        device.load_lora(file, 0.5)
        assert_allclose(weights(device)["unet", "conv_in.weight"].get(), after, atol=1e-6)


# ---- peft's own modules, saved by peft --------------------------------------------------------

LAYERS = ["to_q", "to_k", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "proj_in", "q_proj",
          "fc1"]
CONFIGS = {
    "LoRA": peft.LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, init_lora_weights=False,
                            rank_pattern={"to_k": 3}, alpha_pattern={"to_out.0": 5}),
    "rsLoRA": peft.LoraConfig(r=2, lora_alpha=3, target_modules=LAYERS, init_lora_weights=False,
                              use_rslora=True),
    "LoHa": peft.LoHaConfig(r=2, alpha=3, target_modules=LAYERS, init_weights=False,
                            rank_pattern={"to_k": 3}, alpha_pattern={"to_out.0": 5}),
    "LoHa, Tucker": peft.LoHaConfig(r=2, alpha=3, target_modules=LAYERS, init_weights=False,
                                    use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=1, alpha=3, target_modules=LAYERS, init_weights=False,
                            alpha_pattern={"to_out.0": 5}),
    "LoKr, both": peft.LoKrConfig(r=1, alpha=3, target_modules=LAYERS, init_weights=False,
                                  decompose_both=True, decompose_factor=4),
    "LoKr, Tucker": peft.LoKrConfig(r=1, alpha=3, target_modules=LAYERS, init_weights=False,
                                    use_effective_conv2d=True),
    "LoKr, whole": peft.LoKrConfig(r=4, alpha=3, target_modules=LAYERS, init_weights=False,
                                   rank_pattern={"to_k": 5})}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("saved", ["by peft", "as a state dict"])
def test_what_peft_trains(saved, kind, part, small_folder, reference, tmp_path):
    """adapter_model.safetensors beside its adapter_config.json, also with a state dict's names."""
    theirs = peft.get_peft_model(getattr(reference, part), CONFIGS[kind], adapter_name="a1")
    theirs.save_pretrained(tmp_path)                    # into the adapter's folder
    file = tmp_path / "a1" / "adapter_model.safetensors"
    if saved == "as a state dict":
        marks = ("lora_", "hada_", "lokr_")
        write({f"{part}.{name}": tensor.detach() for name, tensor in theirs.state_dict().items()
               if any(mark in name for mark in marks)}, file)
    setattr(reference, part, theirs.merge_and_unload())
    pipe = load(small_folder)
    before = weights(pipe)
    pipe.load_lora(file.parent if saved == "by peft" else file)
    assert_same_weights(pipe, reference)
    changed = [place for place, array in weights(pipe).items() if array is not before[place]]
    assert len(changed) > 3 and {place[0] for place in changed} == {part}
