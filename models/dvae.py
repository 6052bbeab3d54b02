"""Image tokenizers: what a masked patch has to be recognised as (BEiT, Bao et al. 2021).

Each maps a view of the image, (B, 3, R, R) with values in [0, 1], to one code per 8x8 patch, (B, (R/8)^2)
int64 in raster order. With R half the encoder's resolution these are its 16x16 patches. All are frozen.

* DalleEncoder: the encoder of DALL-E's discrete VAE (Ramesh et al. 2021), as the paper uses it. Its weights
  come as OpenAI's `encoder.pkl` or as the codebook of FLAVA, which is the same network.
* KMeansCodebook: the nearest of K mean patches; fitted on the training images in seconds, needs no download.

Shapes: B batch, R resolution, V vocabulary, K centres, P values of a patch (3 * 8 * 8).
"""

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla.utils import UserError

STRIDE = 8  # pixels of a code view for each code, along one side


# ---- DALL-E ----


class _Conv(nn.Module):
    """A convolution that keeps the resolution, with the parameter names of the published weights."""

    def __init__(self, num_in: int, num_out: int, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(num_out, num_in, size, size) / (num_in * size**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(num_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class _Block(nn.Module):
    def __init__(self, num_in: int, num_out: int, num_blocks: int) -> None:
        super().__init__()
        self.id_path = _Conv(num_in, num_out, 1) if num_in != num_out else nn.Identity()
        widths, sizes = (num_in, *[num_out // 4] * 3, num_out), (3, 3, 3, 1)
        layers = OrderedDict()
        for i, size in enumerate(sizes):
            layers[f"relu_{i + 1}"] = nn.ReLU(inplace=i > 0)  # the first one's input is also the shortcut's
            layers[f"conv_{i + 1}"] = _Conv(widths[i], widths[i + 1], size)
        self.res_path = nn.Sequential(layers)
        self.gain = 1 / num_blocks**2

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class DalleEncoder(nn.Module):
    """DALL-E's dVAE encoder: groups of residual blocks, between them twice the width, half the resolution."""

    def __init__(
        self, n_hid: int = 256, vocab_size: int = 8192, n_blk_per_group: int = 2, groups: int = 4
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.stride = 2 ** (groups - 1)
        self.blocks = nn.Sequential(OrderedDict(input=_Conv(3, n_hid, 7)))
        width = n_hid
        for group in range(groups):
            layers = OrderedDict()
            for i in range(n_blk_per_group):
                layers[f"block_{i + 1}"] = _Block(width, n_hid * 2**group, groups * n_blk_per_group)
                width = n_hid * 2**group
            if group + 1 < groups:
                layers["pool"] = nn.MaxPool2d(2)
            self.blocks.add_module(f"group_{group + 1}", nn.Sequential(layers))
        output = OrderedDict(relu=nn.ReLU(), conv=_Conv(width, vocab_size, 1))
        self.blocks.add_module("output", nn.Sequential(output))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def logits(self, code_view: Tensor) -> Tensor:
        """Return scores of the codes (B, V, R/8, R/8), float32, of views (B, 3, R, R) in [0, 1]."""
        x = code_view.float().contiguous(memory_format=torch.channels_last)
        x = 0.8 * x + 0.1  # the logit-Laplace range [0.1, 0.9] of DALL-E
        device = x.device.type
        # As published: half precision on GPUs but for the output layer, whatever the training's precision is.
        with torch.autocast(device, dtype=torch.float16, enabled=device == "cuda"):
            x = self.blocks[:-1](x)
        with torch.autocast(device, enabled=False):
            return self.blocks[-1](x.float())

    def forward(self, code_view: Tensor) -> Tensor:
        """Return the codes (B, (R/8)^2), int64, of views (B, 3, R, R) in [0, 1]."""
        return self.logits(code_view).argmax(1).flatten(1)


# ---- k-means ----


def _patches(views: Tensor, size: int) -> Tensor:
    """Return the patches of views (B, 3, R, R) as rows: (B, (R/size)^2, P)."""
    grid = views.float().unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, 3, rows, s, columns, s)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@torch.no_grad()
def _nearest(patches: Tensor, centres: Tensor, chunk: int = 16384) -> Tensor:
    """Return the nearest centres, argmin |x - c|^2 = argmax x.c - |c|^2 / 2: (N, P), (K, P) -> (N,)."""
    half_norms = centres.square().sum(1) / 2
    with torch.autocast(patches.device.type, enabled=False):
        nearest = [(rows @ centres.T - half_norms).argmax(1) for rows in patches.split(chunk)]
    return torch.cat(nearest)


class KMeansCodebook(nn.Module):
    """The code of a patch is the nearest of K mean patches."""

    def __init__(self, vocab_size: int, patch: int = 8) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.stride = patch
        self.register_buffer("centres", torch.zeros(vocab_size, 3 * patch * patch))  # (K, P)

    def forward(self, code_view: Tensor) -> Tensor:
        """Return the codes (B, (R/8)^2), int64, of views (B, 3, R, R) in [0, 1]."""
        patches = _patches(code_view, self.stride)
        return _nearest(patches.flatten(0, 1), self.centres).view(patches.shape[:2])

    @torch.no_grad()
    def fit(
        self, code_views: Iterable[Tensor], num_patches: int = 100_000, iterations: int = 12, seed: int = 0
    ) -> "KMeansCodebook":
        """Fit the centres to patches of the first views, each (3, R, R) or (B, 3, R, R), by Lloyd's algorithm
        on the CPU.

        Centres start at random patches; those that lose all theirs move to the worst-served patches. Raises
        UserError when there are fewer patches than centres.
        """
        generator = torch.Generator().manual_seed(seed)
        pool, num_pooled = [], 0
        for views in code_views:
            patches = _patches(views.cpu().reshape(-1, *views.shape[-3:]), self.stride).flatten(0, 1)
            pool.append(patches)
            num_pooled += len(patches)
            if num_pooled >= 2 * num_patches:  # more than needed, for patches of more images
                break
        if num_pooled < self.vocab_size:
            raise UserError(
                f"{num_pooled} patches cannot give {self.vocab_size} k-means codes; use more images or a "
                "smaller image_tokenizer.vocab_size"
            )
        patches = torch.cat(pool)
        patches = patches[torch.randperm(num_pooled, generator=generator)[:num_patches]]
        centres = patches[: self.vocab_size].clone()  # they are in random order
        for _ in range(iterations):
            codes = _nearest(patches, centres)
            counts = torch.bincount(codes, minlength=self.vocab_size)
            sums = torch.zeros_like(centres).index_add_(0, codes, patches)
            empty = (counts == 0).nonzero().flatten()
            if len(empty):
                distances = (patches - centres[codes]).square().sum(1)
                sums[empty] = patches[distances.topk(len(empty)).indices]
            centres = sums / counts.clamp(min=1)[:, None]
        self.centres.copy_(centres)
        return self
