"""python -m tinyldm.training lora: train a LoRA on your pictures.

    weights ─load→ pipeline ─add_lora→ frozen, with thin matrices that are trained
    pictures, captions ─FineTuning→ gradients ─Trainer→ dog.safetensors ─read back→ checked

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; diffusers' examples/text_to_image and
examples/dreambooth (train_text_to_image_lora.py, train_dreambooth_lora.py).
"""
import numpy as np

from ...checkpoints import write_lora
from ...cli.options import path
from ...errors import TinyldmError
from ...models.lora import DIFFUSERS, KOHYA, TEXT_DIFFUSERS, TEXT_KOHYA, add_lora, remove_lora
from ..options import real, whole
from .stage import Stage
from .stage import add_options as add_common

CREATION = 2 ** 32 - 1      # the key of the first numbers; the steps have smaller ones
SETTINGS = ("rank", "alpha", "targets", "train_text_encoder", "trigger", "prior_weight")
TARGETS = {"attention": (DIFFUSERS, TEXT_DIFFUSERS), "all": (KOHYA, TEXT_KOHYA)}


def add_options(parser):
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=whole(1), default=4, metavar="R", help="of the matrices: the larger, the "
        "more the LoRA can learn, and the larger its file (4)")
    add("--alpha", type=real(0, above=True), metavar="A", help="the change of a weight is "
        "multiplied by A / R (R)")
    add("--targets", choices=TARGETS, default="attention", help="the layers: the projections of "
        "the attention, as diffusers, or all of the transformers, as kohya (attention)")
    add("--trigger", metavar="WORD", help="a word to put before each caption, by which a prompt "
        "asks for what was learned")
    add("--train-text-encoder", action="store_true", help="also train the text encoders")
    add = parser.add_argument_group("prior preservation").add_argument
    add("--prior-data", type=path, metavar="FOLDER", help="pictures of the class of what is "
        "learned, such as other dogs, which the model shall not forget")
    add("--prior-prompt", metavar="TEXT", help="their caption, such as 'a photo of a dog'; those "
        "that are missing are drawn with it")
    add("--prior-count", type=whole(1, 10_000), default=100, metavar="N", help="how many (100)")
    add("--prior-weight", type=real(0), default=1.0, metavar="W", help="of their loss (1)")
    add_common(parser, steps=500, learning_rate=1e-4, output="lora")


def run(options):
    """Train, write and check. Raises TinyldmError for whatever is wrong."""
    if (options.prior_data is None) != (options.prior_prompt is None):
        raise TinyldmError("--prior-data and --prior-prompt go together: name the folder of the "
                           "class's pictures, and their caption")
    stage = Stage(options)
    pipe = stage.pipe
    if options.prior_data:                              # drawn by what is there, without a LoRA
        stage.add_prior(options.prior_data, options.prior_prompt, options.prior_count)
    layers = put_into(pipe, options)

    def write():
        return write_lora(stage.result, layers, options.layout, stage.metadata(), base=stage.base,
                          dtype=options.save_as)

    stage.train(named_matrices(layers), write, SETTINGS)

    def read_back():
        for model in pipe.models.values():
            remove_lora(model)
        untrained = stage.probe()
        pipe.load_lora(stage.result)
        return untrained
    stage.check(read_back)
    stage.show_use("--lora", stage.result)


def put_into(pipe, options):
    """Freeze a pipeline and put LoRAs into it -> {name with its part: LoRA}."""
    unet_layers, text_layers = TARGETS[options.targets]
    ends = {"unet": unet_layers}
    if options.train_text_encoder:
        ends |= {part: text_layers for part in pipe.models if "text_encoder" in part}
    if "text_encoder_2" in ends:                        # the last layer of the first is not used
        used = pipe.text_encoder.settings.num_hidden_layers - 1
        ends["text_encoder"] = [f"layers.{i}.{'' if '.' in name else 'self_attn.'}{name}"
                                for i in range(used) for name in text_layers]
    for model in pipe.models.values():
        model.freeze()
    rng, alpha = np.random.default_rng([options.seed, CREATION]), options.alpha or options.rank
    return {f"{part}.{name}": layer for part, targets in ends.items() for name, layer in
            add_lora(getattr(pipe, part), targets, options.rank, alpha, rng).items()}


def named_matrices(layers):
    """{name: LoRA} -> [(name, Parameter)], of what is trained."""
    return [(f"{name}.{matrix}", getattr(layer, matrix).weight)
            for name, layer in layers.items() for matrix in ("lora_A", "lora_B")]
