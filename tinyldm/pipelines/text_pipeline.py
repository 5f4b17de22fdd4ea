"""What the pipelines with CLIP's text encoder share: it reads prompts, and add-ons may change it.

pipeline.py -> TextPipeline -> Stable Diffusion, the upscaler, the cascade, Stable unCLIP. They
have the attributes tokenizer, text_encoder and unet.
"""
from .conditioning import Conditioner
from .pipeline import Pipeline
from .request import check_finite


class TextPipeline(Pipeline):
    """The part of such a pipeline that does not depend on its system. See above."""

    takes_addons = True

    def load_lora(self, path, weight=1.0):
        """Add a LoRA, times `weight`, to the weights; adding it with -weight undoes it.

        path: a .safetensors file, or one that torch.save wrote, with the names of kohya, LyCORIS
        (LoCon, LoHa, LoKr), peft or diffusers; or a name or page on the hub, owner/name or
        owner/name/file. Several may be added one after another, also one twice. It changes the
        text encoders and the `unet`, in a cascade the base's. The text encoders learn the words
        that come with it. A note names what is left out. See checkpoints/addons/lora.py.
        Raises TinyldmError, and changes nothing, for a file that does not fit this model.
        """
        # Here, so that `import tinyldm` need not wait for the libraries behind it.
        from ..checkpoints import merge_lora, resolve_addon

        check_finite("weight", weight)
        path = resolve_addon(path, "pytorch_lora_weights")
        merge_lora(self.models, path, float(weight), self.unet.dtype, self._encoders)
        self.language = None                            # it may know more now

    def load_textual_inversion(self, path, token=None):
        """Add a learned word to the vocabulary, for use in prompts.

        path: as for load_lora, in the layout of diffusers or of the web interfaces. token: the
        word; the default is the file's own, or else the file's name. See
        checkpoints/addons/textual_inversion.py.
        Raises TinyldmError, and changes nothing, for a file that does not fit this model and for a
        word that is already in the vocabulary.
        """
        from ..checkpoints import add_word, resolve_addon

        add_word(self._encoders, resolve_addon(path, "learned_embeds"), token)
        self.language = None                            # it knows one word more

    @property
    def _encoders(self):
        return dict(zip(("text_encoder", "text_encoder_2"), self._readers))

    @property
    def _readers(self):
        """[(tokenizer, text encoder)], those that read the prompts."""
        return [(self.tokenizer, self.text_encoder)]

    @property
    def _conditioner(self):
        return Conditioner(self._readers, None, False)

    @property
    def tokenizers(self):
        """{part: Tokenizer}."""
        return {"tokenizer": self.tokenizer}
