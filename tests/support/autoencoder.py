"""The loss of latent diffusion's autoencoder in PyTorch, with its discriminator, as a step."""
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.reference import nchw


def patch_gan(channels, layers=3):
    """taming-transformers' NLayerDiscriminator, written after its description."""
    class PatchGAN(nn.Module):
        def __init__(self):
            super().__init__()
            steps, width = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)], channels
            for i in range(1, layers + 1):
                wider = channels * min(2 ** i, 8)
                stride = 2 if i < layers else 1
                steps += [nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                          nn.BatchNorm2d(wider, track_running_stats=False), nn.LeakyReLU(0.2)]
                width = wider
            self.main = nn.Sequential(*steps, nn.Conv2d(width, 1, 4, 1, 1))

        def forward(self, x):
            return self.main(x)
    return PatchGAN()


def encoder_features(vae):
    """Of a diffusers VAE: what each level of its encoder gives."""
    def features(x):
        h, found = vae.encoder.conv_in(x), []
        for block in vae.encoder.down_blocks:
            h = block(h)
            found.append(h)
        return found
    return features


def perceptual(features, output, images):
    """(B,): LPIPS without its weights."""
    found = []
    for a, b in zip(features(output), features(images)):
        unit = [x / x.norm(dim=1, keepdim=True) for x in (a, b)]
        square = ((unit[0] - unit[1]) ** 2).sum(1)
        found.append(square.flatten(1).mean(1))
    return sum(found) / len(found)


class Reference:
    """Two optimisers, as in latent diffusion, but one round trip for both."""

    def __init__(self, vae, discriminator, start, features=None, rate=1e-4, kl_weight=1e-6,
                 weight=0.5, squared=False):
        self.vae, self.discriminator, self.features = vae, discriminator, features
        self.kl_weight, self.weight, self.squared = kl_weight, weight, squared
        self.start = start
        self.of_vae, self.of_discriminator = (
            torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.5, 0.9), weight_decay=0)
            for model in (vae, discriminator))

    def losses(self, images, noise, step):
        """-> loss without the generator's part, generator, adaptive weight, discriminator."""
        images, noise = nchw(images), nchw(noise)
        posterior = self.vae.encode(images).latent_dist
        output = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = (images - output) ** 2 if self.squared else (images - output).abs()
        if self.features:
            error = error + perceptual(self.features, output, images)[:, None, None, None]
        rest = error.sum() / len(images)
        kl = posterior.kl().sum() / len(images)
        active = float(step >= self.start)
        generator = -self.discriminator(output).mean()
        last = self.vae.decoder.conv_out.weight
        rest_length, own_length = (torch.autograd.grad(x, last, retain_graph=True)[0].norm()
                                   for x in (rest, generator))
        adaptive = self.weight * (rest_length / (own_length + 1e-4)).clamp(0, 1e4).detach()
        real, made = self.discriminator(images), self.discriminator(output.detach())
        hinge = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
        return rest + self.kl_weight * kl, active * generator, adaptive, active * hinge

    def step(self, images, noise, step):
        """-> the losses as numbers, and both gradients' norms."""
        loss, generator, adaptive, hinge = self.losses(images, noise, step)
        self.of_vae.zero_grad()
        (loss + adaptive * generator).backward()
        self.of_discriminator.zero_grad()               # of the generator's part
        hinge.backward()
        norms = [torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
                 for model in (self.vae, self.discriminator)]
        self.of_vae.step()
        self.of_discriminator.step()
        return [x.item() for x in (loss, generator, adaptive, hinge)], norms
