"""The autoencoder: images (B,H,W,3) in [-1, 1] <-> latents (B,H/8,W/8,4), where diffusion happens.

First and last in the flow of data: the decoder turns the denoised latents into the picture, the
encoder makes the latents that training and image-to-image start from.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
arXiv:2112.10752, section 3.1 and appendix G; Kingma & Welling 2013, arXiv:1312.6114, for mean and
log-variance.
"""
from dataclasses import dataclass

from .. import ops
from ..backend import get_xp
from ..configs import Config, one_of, sides, within
from ..errors import TinyldmError
from ..layers import (
    NO_TAPE,
    Conv2d,
    GroupNormSiLU,
    Module,
    Sequence,
    checkpoint,
    checkpoint_backward,
    ends_early,
)
from .blocks import Downsample2D, ResnetBlock2D, SpatialAttention, Upsample2D, check_groups

EPS = 1e-6      # every norm of the VAE; the UNet's residual blocks use 1e-5
OVERLAP = 0.25  # the share of a tile's side that it has in common with the next tile


@dataclass(frozen=True)
class VAEConfig(Config):
    """The public vae/config.json. Defaults are those of diffusers."""

    CHANGES = {"act_fn": ("silu", "swish"), "mid_block_add_attention": (True,),
               "shift_factor": (None, 0), "use_quant_conv": (True,),
               "use_post_quant_conv": (True,), "norm_type": ("group",),
               "quantization_config": (None,)}

    block_out_channels: list[int] = within(1, 65536)
    latent_channels: int = within(1, 256)
    in_channels: int = within(1, 1024, 3)               # RGB
    out_channels: int = within(1, 1024, 3)
    layers_per_block: int = within(1, 8, 1)             # Stable Diffusion says 2
    norm_num_groups: int = within(1, 65536, 32)
    down_block_types: list[str] | None = one_of("DownEncoderBlock2D", default=None)
    up_block_types: list[str] | None = one_of("UpDecoderBlock2D", default=None)
    scaling_factor: float = within(0, 1e4, 0.18215)     # Stable Diffusion 1; its old files lack it
    # The mean and the standard deviation of each latent channel.
    latents_mean: list[float] | None = within(-1e4, 1e4, None, lengths=range(1, 257))
    latents_std: list[float] | None = within(0, 1e4, None, lengths=range(1, 257))
    # In pixels; a number or [height, width].
    sample_size: int | list[int] | None = within(1, 65536, 32, lengths=(2,))
    force_upcast: bool | None = None                    # float32 in a pipeline of float16

    def __post_init__(self):
        for key, count in [("down_block_types", len(self.block_out_channels)),
                           ("up_block_types", len(self.block_out_channels)),
                           ("latents_mean", self.latent_channels),
                           ("latents_std", self.latent_channels)]:
            value = getattr(self, key)
            if value is not None and len(value) != count:
                raise TinyldmError(f"{key} has {len(value)} entries: expected {count}, as many as "
                                   "the VAE has levels (block_out_channels) or latent channels")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise TinyldmError("latents_mean and latents_std must be given both, or neither")
        check_groups(self.block_out_channels, self.norm_num_groups)


class AutoencoderKL(Module):
    """config: the dict of the public vae/config.json; settings: the same as a VAEConfig.

    z, the latents here, is unscaled. to_latents gives it variance 1, as the UNet sees it; to_z
    undoes that.

    encode: images (B,H,W,3) in [-1, 1] -> mean, logvar (B,H/f,W/f,4). f = 2^(levels - 1) is
            `vae_scale_factor`, pixels per latent in each direction; H and W are multiples of f.
    decode: z (B,h,w,4) -> images (B,f*h,f*w,3), about [-1, 1].
    encode_tiled, decode_tiled: the same, tile by tile.
    Raises TinyldmError for a config that is not supported.
    """

    Settings = VAEConfig
    settings = property(lambda self: self.Settings.read(self.config))

    def __init__(self, config):
        self.config = config
        settings = self.settings
        C, size = settings.latent_channels, settings.sample_size or 32
        self.encoder = Encoder(settings)
        self.decoder = Decoder(settings)
        self.quant_conv = Conv2d(2 * C, 2 * C, 1)
        self.post_quant_conv = Conv2d(C, C, 1)
        self.scaling_factor = settings.scaling_factor
        self.vae_scale_factor = 2 ** (len(settings.block_out_channels) - 1)
        self.tile = max(1, min(sides(size)) // self.vae_scale_factor)   # its side, in latents

    def to_latents(self, z):
        """z (B,h,w,C) -> latents (z - latents_mean) * scaling_factor / latents_std, for the UNet.

        Most configs have only the factor. diffusers 0.42.1 reads the other two in Stable Diffusion
        XL alone; here they count in every pipeline, as a VAE means the same in all.
        """
        if self.settings.latents_std is not None:
            z = (z - self._per_channel("latents_mean", z)) / self._per_channel("latents_std", z)
        return z * self.scaling_factor

    def to_z(self, latents):
        """The inverse of to_latents."""
        z = latents / self.scaling_factor
        if self.settings.latents_std is not None:
            z = z * self._per_channel("latents_std", z) + self._per_channel("latents_mean", z)
        return z

    def _per_channel(self, key, like):                  # -> (C,)
        return get_xp(like).asarray(getattr(self.settings, key), like.dtype)

    def encode(self, images, tape=NO_TAPE):
        return self._distribution(self._moments(images, tape), tape)

    def _moments(self, images, tape=NO_TAPE):           # -> (B,h,w,2*4)
        h = self.encoder(images, tape)
        return self.quant_conv(h, tape)

    def _distribution(self, moments, tape=NO_TAPE):
        (mean, logvar), _ = ops.split(moments)
        inside = (logvar > -30) & (logvar < 20)         # the limits of the reference
        tape.save(self, inside)
        return mean, logvar.clip(-30, 20)

    @ends_early()
    def encode_backward(self, dmean, dlogvar, tape):    # -> dimages (B,H,W,3)
        dlogvar = dlogvar * tape.load(self)             # no gradient where it was clipped
        dmoments = ops.split_backward((dmean, dlogvar), None)
        dh = self.quant_conv.backward(dmoments, tape)
        return self.encoder.backward(dh, tape)

    def decode(self, z, tape=NO_TAPE):
        h = self.post_quant_conv(z, tape)
        return self.decoder(h, tape)

    @ends_early()
    def decode_backward(self, dimages, tape):           # -> dz (B,h,w,4)
        dh = self.decoder.backward(dimages, tape)
        return self.post_quant_conv.backward(dh, tape)

    def decode_tiled(self, z):
        """As decode, tile by tile: a picture of any size then needs no more memory than a tile.

        z (B,h,w,4) -> images (B,f*h,f*w,3). A tile has the size of the VAE's training pictures
        (`sample_size`); a picture that fits in one tile is the same as without tiles. Larger ones
        differ a little, because norms and attention see one tile only. Neighbouring tiles overlap
        by a quarter of their side, and one fades into the other there.
        Source: diffusers 0.42.1, AutoencoderKL.tiled_decode.
        """
        return in_tiles(self.decode, z, self.tile, 1, self.vae_scale_factor)

    def encode_tiled(self, images):
        """As encode, tile by tile: see decode_tiled."""
        moments = in_tiles(self._moments, images, self.tile, self.vae_scale_factor, 1)
        return self._distribution(moments)


def in_tiles(function, x, tile, size, factor):
    """function(x), tile by tile, each fading into the next: (B,H,W,C) -> (B,rH,rW,C').

    tile: the side of a tile in latents. One latent is `size` positions of x wide and `factor`
    positions of the result.
    """
    side = tile * size
    if max(x.shape[1:3]) <= side:
        return function(x)
    step = max(1, int(tile * (1 - OVERLAP)))
    kept, shared = factor * step, factor * (tile - step)    # a tile's own part, and the overlap
    concatenate = get_xp(x).concatenate
    rows, above = [], []
    for top in range(0, x.shape[1], step * size):
        row = []
        for left in range(0, x.shape[2], step * size):
            y = function(x[:, top:top + side, left:left + side])
            if top:
                y = fade(above[len(row)], y, shared, axis=1)
            if left:
                y = fade(row[-1], y, shared, axis=2)
            row.append(y)
        rows.append(concatenate([y[:, :kept, :kept] for y in row], axis=2))
        above = row
    return concatenate(rows, axis=1)


def fade(before, images, shared, axis):
    """images (B,H,W,C), their first rows (axis 1) or columns (axis 2) faded in over before's last.

    shared: how many rows or columns, or all where an image has fewer.
    """
    xp, length = get_xp(images), before.shape[axis]
    shared = min(shared, length, images.shape[axis])
    ramp = xp.arange(shared, dtype=images.dtype) / shared                # 0 to almost 1
    ramp = ramp.reshape(-1, *[1] * (3 - axis))                           # (n,1,1) or (n,1)
    _, end = xp.split(before, [length - shared], axis)
    begin, rest = xp.split(images, [shared], axis)
    return xp.concatenate([end * (1 - ramp) + begin * ramp, rest], axis)


class Encoder(Sequence):
    """conv_in → down blocks → middle → conv_out; mean and log-variance share the last channels."""

    def __init__(self, config):
        widths, layers = config.block_out_channels, config.layers_per_block
        groups, last = config.norm_num_groups, len(widths) - 1
        self.conv_in = Conv2d(config.in_channels, widths[0])
        self.down_blocks = [ResampleBlock2D(widths[max(i - 1, 0)], width, layers, groups,
                                            down=i < last) for i, width in enumerate(widths)]
        self.mid_block = MidBlock2D(widths[-1], groups)
        self.conv_norm_out = GroupNormSiLU(widths[-1], groups, EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels)

    def layers(self):                                   # (B,H,W,3) -> (B,H/f,W/f,2*4)
        return [self.conv_in, *self.down_blocks, self.mid_block, self.conv_norm_out, self.conv_out]


class Decoder(Sequence):
    """The encoder in reverse, with one more residual block at each level."""

    def __init__(self, config):
        widths, layers = config.block_out_channels[::-1], config.layers_per_block + 1
        groups, last = config.norm_num_groups, len(widths) - 1
        self.conv_in = Conv2d(config.latent_channels, widths[0])
        self.mid_block = MidBlock2D(widths[0], groups)
        self.up_blocks = [ResampleBlock2D(widths[max(i - 1, 0)], width, layers, groups,
                                          up=i < last) for i, width in enumerate(widths)]
        self.conv_norm_out = GroupNormSiLU(widths[-1], groups, EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels)

    def layers(self):                                   # (B,h,w,4) -> (B,f*h,f*w,3)
        return [self.conv_in, self.mid_block, *self.up_blocks, self.conv_norm_out, self.conv_out]


class ResampleBlock2D(Module):
    """Residual blocks, then downsampling (in the encoder) or upsampling (in the decoder)."""

    def __init__(self, in_channels, out_channels, layers, groups, down=False, up=False):
        self.resnets = [ResnetBlock2D(C, out_channels, groups, EPS)
                        for C in [in_channels] + [out_channels] * (layers - 1)]
        # Padded at the right and bottom only: an even size is then halved exactly.
        self.downsamplers = [Downsample2D(out_channels, padding=(0, 1))] if down else []
        self.upsamplers = [Upsample2D(out_channels)] if up else []

    def forward(self, h, tape=NO_TAPE):                 # (B,H,W,C) -> (B,H',W',C')
        for resnet in self.resnets:
            h = checkpoint(resnet, tape, h)
        for layer in self.downsamplers + self.upsamplers:
            h = layer(h, tape)
        return h

    def backward(self, dh, tape):
        for layer in self.upsamplers + self.downsamplers:
            dh = layer.backward(dh, tape)
        for resnet in reversed(self.resnets):
            dh, _ = checkpoint_backward(resnet, dh, tape)
        return dh


class MidBlock2D(Module):
    """Residual block, attention over all positions, residual block."""

    def __init__(self, channels, groups):
        self.resnets = [ResnetBlock2D(channels, channels, groups, EPS) for _ in range(2)]
        self.attentions = [SpatialAttention(channels, groups, EPS)]

    def forward(self, h, tape=NO_TAPE):                 # (B,H,W,C) -> (B,H,W,C)
        h = checkpoint(self.resnets[0], tape, h)
        h = checkpoint(self.attentions[0], tape, h)
        return checkpoint(self.resnets[1], tape, h)

    def backward(self, dh, tape):
        dh, _ = checkpoint_backward(self.resnets[1], dh, tape)
        dh = checkpoint_backward(self.attentions[0], dh, tape)
        dh, _ = checkpoint_backward(self.resnets[0], dh, tape)
        return dh
