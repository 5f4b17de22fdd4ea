"""What the models share: embeddings of time and classes, residual block, attention, feed-forward
layer, resampling."""
from .. import ops
from ..backend import add_up, wide
from ..errors import TinyldmError
from ..layers import (
    NO_TAPE,
    Activation,
    AdaGroupNormSiLU,
    Conv2d,
    Embedding,
    GroupNorm,
    GroupNormSiLU,
    Linear,
    Module,
    Sequence,
    Upsample,
)


def check_groups(widths, groups):
    """Raise TinyldmError for a config whose group norms cannot divide the channels evenly."""
    if wrong := [width for width in widths if width % groups]:
        raise TinyldmError(f"norm_num_groups must divide every entry of block_out_channels, but "
                           f"{groups} does not divide {wrong[0]}")


def check_condition(layer, option, projection, name, value):
    """Assert that forward got the condition `name` exactly if the layer was built for it."""
    built, takes = ("without", "takes no") if projection is None else ("with", "needs")
    assert (projection is None) == (value is None), (
        f"this {type(layer).__name__} was built {built} {option}, so its forward {takes} {name}")


def sinusoidal(numbers, dim, settings, dtype):
    """(B,) or (B,n) -> (B*n,dim). In float32 at least: float16 is too coarse for angles of 981.

    settings: a config that has flip_sin_to_cos and freq_shift.
    """
    embedding, _ = ops.timestep_embedding(numbers.reshape(-1).astype(wide(dtype)), dim,
                                          settings.flip_sin_to_cos, settings.freq_shift)
    return embedding.astype(dtype, copy=False)


def for_contexts(x, like):
    """x (B,...) n times, one after another -> (nB,...), where like is (nB,...). n = 1: x itself.

    With guidance, the UNet reads every latent with n contexts. What comes before the first
    cross-attention is computed once, and repeated where it meets what depends on the context. Of
    contexts that cannot be shared, x stays as it is, and the attention says what it expected.
    """
    n, rest = divmod(len(like), len(x))
    return x if n < 2 or rest else x[None].repeat(n, axis=0).reshape(-1, *x.shape[1:])


class EmbeddingMLP(Sequence):
    """A two-layer perceptron with SiLU: (B,C) -> (B,E)."""

    def __init__(self, channels, temb_channels):
        self.linear_1 = Linear(channels, temb_channels)
        self.act = Activation("silu")
        self.linear_2 = Linear(temb_channels, temb_channels)

    def layers(self):
        return [self.linear_1, self.act, self.linear_2]


class TimestepEmbedding(EmbeddingMLP):
    """A two-layer perceptron on a sinusoidal embedding x: (B,C) -> (B,E).

    condition (B,F): added to x after a projection, where the layer was built with cond_channels.
    """

    def __init__(self, channels, temb_channels, cond_channels=None):
        self.cond_proj = Linear(cond_channels, channels, bias=False) if cond_channels else None
        super().__init__(channels, temb_channels)

    def forward(self, x, tape=NO_TAPE, *, condition=None):
        check_condition(self, "cond_channels", self.cond_proj, "condition", condition)
        if self.cond_proj:
            x = x + self.cond_proj(condition, tape)
        return super().forward(x, tape)

    def backward(self, dtemb, tape):                    # -> (B,C), (B,F) or None
        dx = super().backward(dtemb, tape)
        return dx, self.cond_proj.backward(dx, tape) if self.cond_proj else None


class Identity(Sequence):
    """y = x. A layer without parameters."""

    def layers(self):
        return []


CLASS_EMBEDDINGS = "timestep", "projection", "simple_projection", "identity"


def ClassEmbedding(kind, temb_channels, *, num_classes=None, channels=None):
    """The layer from class labels to what is added to the time embedding: labels -> (B,E).

    kind: `class_embed_type` of the config. It says what the labels are:
      None                  (B,) integers in [0, num_classes): rows of a table
      "timestep"            (B,channels), the sinusoidal embedding of (B,) numbers: a perceptron
      "projection"          (B,channels), any vectors: the same perceptron
      "simple_projection"   (B,channels): one linear layer
      "identity"            (B,E), added as they are
    Its backward: (B,E) -> the gradient of the labels; None for the table, whose labels have none.
    A model without classes has kind None and num_classes None: then there is no layer -> None.
    """
    if kind is None:
        return Embedding(num_classes, temb_channels) if num_classes else None
    if kind == "identity":
        return Identity()
    if kind == "simple_projection":
        return Linear(channels, temb_channels)
    return EmbeddingMLP(channels, temb_channels)


class ResnetBlock2D(Module):
    """Norm → SiLU → convolution, twice; the input is added to the output.

    temb (B,E): the time embedding, added between the two; with scale_shift, it scales and shifts
    the second norm's output. The VAE has no timesteps and gives none.
    resample: a layer that changes the size before the first convolution, and that of the input, or
    None. temb may have fewer rows than x: see for_contexts.
    Source: He et al. 2016, arXiv:1603.05027, fig. 4e; with time: Ho et al. 2020, arXiv:2006.11239,
    appendix B; scale_shift and resample: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.
    """

    def __init__(self, in_channels, out_channels, num_groups, eps, temb_channels=None, *,
                 scale_shift=False, resample=None):
        self.norm1 = GroupNormSiLU(in_channels, num_groups, eps)
        self.resample = resample
        self.conv1 = Conv2d(in_channels, out_channels)
        self.scale_shift = scale_shift
        self.nonlinearity = Activation("silu") if temb_channels else None
        self.time_emb_proj = (Linear(temb_channels, out_channels * (1 + scale_shift))
                              if temb_channels else None)
        norm2 = AdaGroupNormSiLU if scale_shift else GroupNormSiLU
        self.norm2 = norm2(out_channels, num_groups, eps)
        self.conv2 = Conv2d(out_channels, out_channels)
        changes = in_channels != out_channels
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if changes else None

    def forward(self, x, tape=NO_TAPE, *, temb=None):   # (B,H,W,C), (B,E) -> (B,H,W,O)
        h, x = self._branches(x, tape, temb=temb)
        h = self.conv2(h, tape)
        h += self.conv_shortcut(x, tape) if self.conv_shortcut else x
        return h

    def again(self, x, tape=NO_TAPE, *, temb=None):
        h, x = self._branches(x, tape, temb=temb)
        self.conv2.again(h, tape)
        if self.conv_shortcut:
            self.conv_shortcut.again(x, tape)

    def _branches(self, x, tape=NO_TAPE, *, temb=None):
        """-> the inputs of the last convolutions: of conv2, and of conv_shortcut."""
        check_condition(self, "temb_channels", self.time_emb_proj, "temb", temb)
        h = self.norm1(x, tape)
        if self.resample:
            h, x = self.resample(h, tape), self.resample(x, tape)
        h = self.conv1(h, tape)
        if self.time_emb_proj:
            e = self.nonlinearity(temb, tape)
            e = self.time_emb_proj(e, tape)             # (B,O), or (B,2O) with scale_shift
        if self.scale_shift:
            h = self.norm2(h, e, tape)
        else:
            if self.time_emb_proj:
                e = for_contexts(e, h)
                h += e[:, None, None, :]                # in place: nothing else uses conv1's output
            h = self.norm2(h, tape)
        return h, x

    def backward(self, dy, tape):                       # (B,H,W,O) -> (B,H,W,C), (B,E) or None
        dx = self.conv_shortcut.backward(dy, tape) if self.conv_shortcut else dy
        dh = self.conv2.backward(dy, tape)
        if self.scale_shift:
            dh, de = self.norm2.backward(dh, tape)
        else:
            dh = self.norm2.backward(dh, tape)
            de = add_up(dh, axis=(1, 2)) if self.time_emb_proj else None    # undoes the broadcast
        dtemb = None
        if self.time_emb_proj:
            de = self.time_emb_proj.backward(de, tape)
            dtemb = self.nonlinearity.backward(de, tape)
        dh = self.conv1.backward(dh, tape)
        if self.resample:
            dx, dh = self.resample.backward(dx, tape), self.resample.backward(dh, tape)
        return dx + self.norm1.backward(dh, tape), dtemb    # x was used twice: add


class Attention(Module):
    """Queries from x; keys and values from the context. For self-attention the context is x.

    mask (B,N,M): see ops.attention.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2; Rombach et al. 2022,
    arXiv:2112.10752, section 3.3.
    """

    def __init__(self, channels, context_channels, num_heads, bias=False):
        self.to_q = Linear(channels, channels, bias)
        self.to_k = Linear(context_channels, channels, bias)
        self.to_v = Linear(context_channels, channels, bias)
        self.to_out = [Linear(channels, channels)]
        self.num_heads = num_heads

    def forward(self, x, context, tape=NO_TAPE, *, mask=None):  # (B,N,C), (B,M,D) -> (B,N,C)
        B, D = len(x), self.to_k.weight.shape[1]
        assert context.ndim == 3 and (len(context), context.shape[2]) == (B, D), (
            f"the context must be (B,M,D) = ({B},M,{D}), not {context.shape}")
        q = self.to_q(x, tape)
        k = self.to_k(context, tape)                    # (B,M,C)
        v = self.to_v(context, tape)
        y, cache = ops.attention(q, k, v, self.num_heads, mask=mask)
        tape.save(self, cache)
        return self.to_out[0](y, tape)

    def backward(self, dy, tape):                       # (B,N,C) -> (B,N,C), (B,M,D)
        dy = self.to_out[0].backward(dy, tape)
        dq, dk, dv = ops.attention_backward(dy, tape.load(self))
        dcontext = self.to_v.backward(dv, tape)         # keys and values read the same context: add
        dcontext = dcontext + self.to_k.backward(dk, tape)
        return self.to_q.backward(dq, tape), dcontext


class SpatialAttention(Attention):
    """Self-attention between the positions of a map; x is added to the output.

    num_groups: of the norm before it; None: no norm.
    """

    def __init__(self, channels, num_groups, eps, num_heads=1):
        super().__init__(channels, channels, num_heads, bias=True)
        self.group_norm = GroupNorm(channels, num_groups, eps) if num_groups else None

    def forward(self, x, tape=NO_TAPE):                 # (B,H,W,C) -> (B,H,W,C)
        B, _, _, C = x.shape
        h = self.group_norm(x, tape) if self.group_norm else x
        h = h.reshape(B, -1, C)                         # (B,N,C)
        return x + super().forward(h, h, tape).reshape(x.shape)

    def backward(self, dy, tape):
        B, _, _, C = dy.shape
        dh, dcontext = super().backward(dy.reshape(B, -1, C), tape)
        dh = (dh + dcontext).reshape(dy.shape)          # h was its own context: add
        return dy + (self.group_norm.backward(dh, tape) if self.group_norm else dh)


class FeedForward(Sequence):
    """A perceptron with 4C hidden channels, for each token alone. activation: of an Activation."""

    def __init__(self, channels, activation="geglu"):
        # In the files number 1 is a dropout, which has no parameters.
        self.net = [ActivatedLinear(channels, 4 * channels, activation), None,
                    Linear(4 * channels, channels)]

    def layers(self):                                   # (B,N,C) -> (B,N,C)
        return self.net[::2]


class ActivatedLinear(Sequence):
    """A linear layer, then an activation. GEGLU makes one number of two, so it gets twice as many.
    """

    def __init__(self, channels, hidden, activation):
        self.proj = Linear(channels, 2 * hidden if activation == "geglu" else hidden)
        self.act = Activation(activation)

    def layers(self):                                   # (B,N,C) -> (B,N,4C)
        return [self.proj, self.act]


class Downsample2D(Sequence):
    """Halve height and width by a convolution with stride 2. padding = (before, after)."""

    def __init__(self, channels, padding):
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def layers(self):                                   # (B,H,W,C) -> (B,⌈H/2⌉,⌈W/2⌉,C)
        return [self.conv]


class Upsample2D(Module):
    """Double height and width: repeat every pixel, then smooth with a convolution."""

    def __init__(self, channels):
        self.nearest = Upsample()
        self.conv = Conv2d(channels, channels)

    def forward(self, x, tape=NO_TAPE, *, size=None):   # (B,H,W,C) -> (B,2H,2W,C), or cut to size
        h = self.nearest(x, tape, size=size)
        return self.conv(h, tape)

    def backward(self, dy, tape):
        dh = self.conv.backward(dy, tape)
        return self.nearest.backward(dh, tape)
