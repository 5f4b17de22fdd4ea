"""The autoencoder: images (B,H,W,3) in [-1, 1] <-> latents (B,H/8,W/8,4), where diffusion happens.

First and last in the flow: the decoder turns the denoised latents into the picture, the encoder
makes the latents that training and image-to-image start from.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models",
arXiv:2112.10752, section 3.1 and appendix G; Kingma & Welling 2013, arXiv:1312.6114, for mean and
log-variance.
"""
from .. import ops
from ..backend import get_xp
from ..layers import NO_TAPE, Conv2d, GroupNorm, GroupNormSiLU, Module
from .blocks import Attention, Downsample2D, ResnetBlock2D, Upsample2D, require

EPS = 1e-6      # every norm of the VAE; the UNet's residual blocks use 1e-5
OVERLAP = 0.25  # of a tile's side that it shares with the next one


class AutoencoderKL(Module):
    """config: the dict of the public vae/config.json. Latents here are unscaled: the pipeline
    multiplies by `scaling_factor` so that the UNet sees variance 1.

    encode: images (B,H,W,3) in [-1, 1] -> mean, logvar (B,H/f,W/f,4), f = 2^(levels - 1);
            H and W multiples of f.
    decode: z (B,h,w,4) -> images (B,f*h,f*w,3), about [-1, 1].
    encode_tiled, decode_tiled: the same in pieces.
    Raises TinyldmError for a config it does not build.
    """

    def __init__(self, config):
        levels = len(config["block_out_channels"])
        require(config, act_fn=("silu",), mid_block_add_attention=(True,), shift_factor=(None,),
                use_quant_conv=(True,), use_post_quant_conv=(True,), norm_type=("group",),
                down_block_types=(["DownEncoderBlock2D"] * levels,),
                up_block_types=(["UpDecoderBlock2D"] * levels,))
        self.config = config
        C = config["latent_channels"]
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * C, 2 * C, 1)
        self.post_quant_conv = Conv2d(C, C, 1)

    @property
    def scaling_factor(self):
        return self.config.get("scaling_factor", 0.18215)

    @property
    def vae_scale_factor(self):
        """How many pixels a latent stands for in each direction."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def encode(self, images, tape=NO_TAPE):
        return self._distribution(self._moments(images, tape), tape)

    def _moments(self, images, tape=NO_TAPE):           # -> (B,h,w,2*4)
        h = self.encoder(images, tape)
        return self.quant_conv(h, tape)

    def _distribution(self, moments, tape=NO_TAPE):
        mean, logvar = ops.split(moments)
        inside = (logvar > -30) & (logvar < 20)         # the reference clamps; beyond, no gradient
        tape.save(self, inside)
        return mean, logvar.clip(-30, 20)

    def encode_backward(self, dmean, dlogvar, tape):    # -> dimages (B,H,W,3)
        dmoments = ops.split_backward(dmean, dlogvar * tape.load(self))
        dh = self.quant_conv.backward(dmoments, tape)
        return self.encoder.backward(dh, tape)

    def decode(self, z, tape=NO_TAPE):
        h = self.post_quant_conv(z, tape)
        return self.decoder(h, tape)

    def decode_backward(self, dimages, tape):           # -> dz (B,h,w,4)
        dh = self.decoder.backward(dimages, tape)
        return self.post_quant_conv.backward(dh, tape)

    def decode_tiled(self, z):
        """As decode, a tile at a time: memory stays a tile's, however large the picture.

        z (B,h,w,4) -> images (B,f*h,f*w,3). A tile is as large as the pictures the VAE was trained
        on (`sample_size`); what fits in one is decoded as ever. Larger pictures come out a little
        different, as norms and attention see a tile only. Neighbours share a quarter of their
        side, where one fades into the other.
        Source: diffusers 0.42.1, AutoencoderKL.tiled_decode.
        """
        return in_tiles(self.decode, z, self.tile, 1, self.vae_scale_factor)

    def encode_tiled(self, images):
        """As encode, a tile at a time: see decode_tiled."""
        moments = in_tiles(self._moments, images, self.tile, self.vae_scale_factor, 1)
        return self._distribution(moments)

    @property
    def tile(self):
        """The side of a tile, in latents."""
        size = self.config.get("sample_size") or 32     # a number, or (height, width)
        side = min(size) if isinstance(size, (list, tuple)) else size
        return max(1, side // self.vae_scale_factor)


def in_tiles(function, x, tile, size, factor):
    """function(x), tile by tile, each fading into the next: (B,H,W,C) -> (B,rH,rW,C').

    tile: the side of one in latents, of which each is `size` places of x and `factor` of the
    result wide.
    """
    side = tile * size
    if max(x.shape[1:3]) <= side:
        return function(x)
    step = max(1, int(tile * (1 - OVERLAP)))
    kept, shared = factor * step, factor * (tile - step)    # of a tile: its own, the next one's
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


def fade(before, image, shared, axis):
    """Images (B,H,W,C) that begin as the end of those before them and turn into themselves.

    shared: over how many rows (axis 1) or columns (axis 2), or as many as there are.
    """
    xp, length = get_xp(image), before.shape[axis]
    shared = min(shared, length, image.shape[axis])
    ramp = xp.arange(shared, dtype=image.dtype) / shared                 # 0 to almost 1
    ramp = ramp.reshape(-1, *[1] * (3 - axis))                           # (n,1,1) or (n,1)
    _, end = xp.split(before, [length - shared], axis)
    begin, rest = xp.split(image, [shared], axis)
    return xp.concatenate([end * (1 - ramp) + begin * ramp, rest], axis)


class Encoder(Module):
    """conv_in → down blocks → middle → conv_out, which gives mean and log-variance side by side."""

    def __init__(self, config):
        widths, layers = config["block_out_channels"], config.get("layers_per_block", 1)
        groups, last = config.get("norm_num_groups", 32), len(widths) - 1
        self.conv_in = Conv2d(config.get("in_channels", 3), widths[0])
        self.down_blocks = [DownEncoderBlock2D(widths[max(i - 1, 0)], width, layers, groups,
                                               downsample=i < last)
                            for i, width in enumerate(widths)]
        self.mid_block = MidBlock2D(widths[-1], groups)
        self.conv_norm_out = GroupNormSiLU(widths[-1], groups, EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config["latent_channels"])

    def forward(self, x, tape=NO_TAPE):                 # (B,H,W,3) -> (B,H/f,W/f,2*4)
        h = self.conv_in(x, tape)
        for block in self.down_blocks:
            h = block(h, tape)
        h = self.mid_block(h, tape)
        h = self.conv_norm_out(h, tape)
        return self.conv_out(h, tape)

    def backward(self, dy, tape):
        dh = self.conv_out.backward(dy, tape)
        dh = self.conv_norm_out.backward(dh, tape)
        dh = self.mid_block.backward(dh, tape)
        for block in reversed(self.down_blocks):
            dh = block.backward(dh, tape)
        return self.conv_in.backward(dh, tape)


class Decoder(Module):
    """The encoder upside down, with one residual block more at each level."""

    def __init__(self, config):
        widths, layers = config["block_out_channels"][::-1], config.get("layers_per_block", 1) + 1
        groups, last = config.get("norm_num_groups", 32), len(widths) - 1
        self.conv_in = Conv2d(config["latent_channels"], widths[0])
        self.mid_block = MidBlock2D(widths[0], groups)
        self.up_blocks = [UpDecoderBlock2D(widths[max(i - 1, 0)], width, layers, groups,
                                           upsample=i < last)
                          for i, width in enumerate(widths)]
        self.conv_norm_out = GroupNormSiLU(widths[-1], groups, EPS)
        self.conv_out = Conv2d(widths[-1], config.get("out_channels", 3))

    def forward(self, z, tape=NO_TAPE):                 # (B,h,w,4) -> (B,f*h,f*w,3)
        h = self.conv_in(z, tape)
        h = self.mid_block(h, tape)
        for block in self.up_blocks:
            h = block(h, tape)
        h = self.conv_norm_out(h, tape)
        return self.conv_out(h, tape)

    def backward(self, dy, tape):
        dh = self.conv_out.backward(dy, tape)
        dh = self.conv_norm_out.backward(dh, tape)
        for block in reversed(self.up_blocks):
            dh = block.backward(dh, tape)
        dh = self.mid_block.backward(dh, tape)
        return self.conv_in.backward(dh, tape)


class DownEncoderBlock2D(Module):
    def __init__(self, in_channels, out_channels, layers, groups, downsample):
        self.resnets = [ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels,
                                      groups, EPS)
                        for i in range(layers)]
        # Right and bottom only: an image of even size then halves exactly.
        self.downsamplers = [Downsample2D(out_channels, padding=(0, 1))] if downsample else []

    def forward(self, h, tape=NO_TAPE):
        for resnet in self.resnets:
            h = resnet(h, tape=tape)
        for downsampler in self.downsamplers:
            h = downsampler(h, tape)
        return h

    def backward(self, dh, tape):
        for downsampler in self.downsamplers:
            dh = downsampler.backward(dh, tape)
        for resnet in reversed(self.resnets):
            dh, _ = resnet.backward(dh, tape)
        return dh


class UpDecoderBlock2D(Module):
    def __init__(self, in_channels, out_channels, layers, groups, upsample):
        self.resnets = [ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels,
                                      groups, EPS)
                        for i in range(layers)]
        self.upsamplers = [Upsample2D(out_channels)] if upsample else []

    def forward(self, h, tape=NO_TAPE):
        for resnet in self.resnets:
            h = resnet(h, tape=tape)
        for upsampler in self.upsamplers:
            h = upsampler(h, tape=tape)
        return h

    def backward(self, dh, tape):
        for upsampler in self.upsamplers:
            dh = upsampler.backward(dh, tape)
        for resnet in reversed(self.resnets):
            dh, _ = resnet.backward(dh, tape)
        return dh


class MidBlock2D(Module):
    """Residual block, attention over all positions, residual block."""

    def __init__(self, channels, groups):
        self.resnets = [ResnetBlock2D(channels, channels, groups, EPS) for _ in range(2)]
        self.attentions = [SpatialAttention(channels, groups)]

    def forward(self, h, tape=NO_TAPE):                 # (B,H,W,C) -> (B,H,W,C)
        h = self.resnets[0](h, tape=tape)
        h = self.attentions[0](h, tape)
        return self.resnets[1](h, tape=tape)

    def backward(self, dh, tape):
        dh, _ = self.resnets[1].backward(dh, tape)
        dh = self.attentions[0].backward(dh, tape)
        dh, _ = self.resnets[0].backward(dh, tape)
        return dh


class SpatialAttention(Attention):
    """Self-attention between the positions of a map: one head over all channels, behind a norm."""

    def __init__(self, channels, groups):
        super().__init__(channels, channels, num_heads=1, bias=True)
        self.group_norm = GroupNorm(channels, groups, EPS)

    def forward(self, x, tape=NO_TAPE):                 # (B,H,W,C) -> (B,H,W,C)
        B, _, _, C = x.shape
        h = self.group_norm(x, tape).reshape(B, -1, C)  # (B,N,C)
        return x + super().forward(h, h, tape).reshape(x.shape)

    def backward(self, dy, tape):
        B, _, _, C = dy.shape
        dh, dcontext = super().backward(dy.reshape(B, -1, C), tape)
        dh = dh + dcontext                              # h was its own context: add
        return dy + self.group_norm.backward(dh.reshape(dy.shape), tape)
